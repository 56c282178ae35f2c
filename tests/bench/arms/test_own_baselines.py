"""Arms with baselines of their own, and runs without a loaded model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest

from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.callables import ArmError, ModelNames
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Verdict, judge
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.presets import Preset, parse
from specdecode.bench.report.markdown import markdown
from specdecode.bench.runs.records import RunFile
from tests.helpers.fake_clock import FakeClock
from tests.helpers.speed_runs import read_back, run_of_results

LENGTH = 20  # longer than in the counters run
NAMES = ModelNames("somebody/model", "", "cpu", "float32")
PROMPTS = {"set/0": [1, 2, 3], "set/1": [4, 5]}


class Decoder:
    """A decoder without a model, with a set speed.

    Attributes:
        tokens: the tokens that it repeats.
        wait: the seconds of an output.
        failing: the calls for outputs of the whole length that raise, counted from 0.
    """

    def __init__(self, tokens: Sequence[int] = (7,), wait: float = 0.01, failing: Sequence[int] = ()) -> None:
        self.tokens, self.wait, self.failing, self.calls = tokens, wait, failing, 0

    def __call__(self, prompt: list[int], count: int) -> list[list[int]]:
        if count == LENGTH:
            self.calls += 1
            if self.calls - 1 in self.failing:
                raise RuntimeError("out of luck")
        time.sleep(self.wait)
        return [[self.tokens[(len(prompt) + place) % len(self.tokens)]] for place in range(count)]


Arms = Callable[..., list[Arm]]


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Arms:
    """Return a function that builds arms of decoders in the given order, from `name=(decoder, baseline)`. They wait by
    a fake clock.
    """
    module, clock = ModuleType("reader"), FakeClock()
    monkeypatch.setitem(sys.modules, "reader", module)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "sleep", clock.advance)

    def make(**decoders: tuple[Any, str | None]) -> list[Arm]:
        made = []
        for name, (decoder, baseline) in decoders.items():
            setattr(module, name, lambda *names, decoder=decoder: decoder)
            entry = {"call": f"reader:{name}"} | ({"baseline": baseline} if baseline else {})
            made.append(make_arm(name, entry, None, None, model_names=NAMES))
        return made

    return make


def run_of(results: Results) -> RunFile:
    """Return the results as read back from a file."""
    return run_of_results(results, LENGTH)


def test_an_arm_is_compared_with_the_arm_that_it_names(arms: Arms) -> None:
    """Guards against an engine whose speculation is credited with the engine's own speed, or charged for its own
    slowness.
    """
    waits = {"plain": 0.005, "engine": 0.2, "drafting": 0.1}
    baselines = {"drafting": "engine"}
    three = arms(**{name: (Decoder(wait=wait), baselines.get(name)) for name, wait in waits.items()})
    run = run_of(experiment(three, PROMPTS, LENGTH, baseline="plain"))
    assert run.header.baseline == "plain"
    assert {arm: run.baseline_of(arm) for arm in run.arms} == {
        "plain": "plain",
        "engine": "plain",
        "drafting": "engine",
    }
    assert run.speedup("drafting").low > 1.2
    assert run.speedup("drafting", over="plain").high < 0.5
    assert run.speedup("engine").high < 0.5
    last = {arm: [row.seconds.last for row in record.rows.values()] for arm, record in run.arms.items()}
    assert all(last["plain"])
    assert all(last["engine"])
    assert last["drafting"] == [None, None]
    # Other work on the machine adds a smaller share to the engine's longer sleep.
    assert run.floor_over("engine") < run.floor_over("plain") == run.header.floor
    text = markdown(run, "a title", "", [], History([], "none"))
    assert "speedup over plain" in text
    assert f"| {run.speedup('drafting')} over engine |" in text


def test_outputs_are_checked_against_the_named_baseline(arms: Arms) -> None:
    """Guards against an arm judged by the output of another arm than its reference arm: a right one called wrong, or a
    wrong one called right.
    """
    other = (1, 2)
    four = arms(
        plain=(Decoder(), None),
        engine=(Decoder(other), None),
        same=(Decoder(other), "engine"),
        different=(Decoder(), "engine"),
    )
    results = experiment(four, PROMPTS, LENGTH, baseline="plain")
    assert results.blocks[0].checks == {"plain": "equal", "engine": "bug", "same": "equal", "different": "bug"}
    assert results.wrong("same") == []
    run = run_of(results)
    assert run.outputs_of("same") == run.arms["engine"].outputs != run.outputs_of("plain") == run.header.outputs
    assert [row.counts.agreed for row in run.arms["same"].rows.values()] == [LENGTH, LENGTH]


def test_a_baseline_that_differs_from_itself_is_wrong(arms: Arms) -> None:
    """Guards against outputs called right because they equal one of several different outputs of the baseline."""

    class Undecided(Decoder):
        def __call__(self, prompt: list[int], count: int) -> list[list[int]]:
            return [[self.calls]] * count if super().__call__(prompt, count) else []

    results = experiment(arms(plain=(Undecided(), None)), PROMPTS, LENGTH, baseline="plain")
    assert results.wrong("plain") == list(PROMPTS)


@pytest.mark.parametrize("failing", [0, 1])
def test_arms_without_their_baseline_are_told(arms: Arms, failing: int) -> None:
    """Guards against a whole run that is lost because a baseline fails, in the first or the second run of a block."""
    four = arms(
        plain=(Decoder(), None),
        engine=(Decoder(failing=[failing]), None),
        drafting=(Decoder(), "engine"),
        other=(Decoder(), None),
    )
    run = run_of(experiment(four, PROMPTS, LENGTH, baseline="plain"))
    assert {arm: record.failure for arm, record in run.arms.items()} == {
        "plain": "",
        "engine": "arm 'engine': it raised RuntimeError: out of luck",
        "drafting": "arm 'drafting': its reference arm engine did not decode",
        "other": "",
    }
    assert not run.arms["drafting"].rows
    assert len(run.arms["other"].rows) == 2


def test_without_the_baseline_of_all_nothing_is_measured(arms: Arms) -> None:
    """Guards against a run that goes on although its reference arm failed, with nothing to compare to."""
    with pytest.raises(ArmError, match="arm 'plain': it raised RuntimeError: out of luck"):
        experiment(arms(plain=(Decoder(failing=[0]), None), other=(Decoder(), None)), PROMPTS, LENGTH, baseline="plain")


def test_the_gate_judges_an_arm_over_its_own_baseline(arms: Arms) -> None:
    """Guards against blaming speculation for a slower engine, and against slower speculation that hides behind a faster
    engine.
    """

    def run(engine: float, drafting: float) -> RunFile:
        three = arms(
            plain=(Decoder(wait=0.02), None),
            engine=(Decoder(wait=engine), None),
            drafting=(Decoder(wait=drafting), "engine"),
        )
        return run_of(experiment(three, PROMPTS, LENGTH, repeats=2, baseline="plain"))

    def verdicts(new: RunFile, old: RunFile) -> dict[str, Verdict]:
        return {judged.arm: judged.verdict for judged in judge(new, old, tolerance=0.3) if judged.gate == "time"}

    before, slower, hiding = run(0.04, 0.02), run(0.08, 0.04), run(0.02, 0.02)
    judged = verdicts(slower, before)
    assert (judged["engine"], judged["drafting"]) == (Verdict.REGRESSED, Verdict.PASS)
    # Without transformers' arm, its own time cannot be told from the machine's.
    assert judged["plain"] is Verdict.NOT_JUDGED
    judged = verdicts(hiding, before)
    assert (judged["engine"], judged["drafting"]) == (Verdict.IMPROVED, Verdict.REGRESSED)


def test_another_baseline_than_before_is_told(arms: Arms) -> None:
    """Guards against comparing speedups over two different baseline arms."""
    runs = [
        run_of(experiment(arms(plain=(Decoder(), None), engine=(Decoder(), None), x=(Decoder(), own)), PROMPTS, LENGTH,
                          baseline="plain"))
        for own in (None, "engine")
    ]  # fmt: skip
    judged = next(judged for judged in judge(runs[1], runs[0]) if (judged.arm, judged.gate) == ("x", "time"))
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert "it is compared with engine, in the baseline with plain" in judged.reason


def test_a_file_without_its_baseline_cannot_be_judged(arms: Arms) -> None:
    """Guards against a traceback for a file from which the baseline arm was deleted."""
    two = arms(plain=(Decoder(), None), engine=(Decoder(), None), drafting=(Decoder(), "engine"))
    run = run_of(experiment(two, PROMPTS, LENGTH, baseline="plain"))
    for missing in ("plain", "engine"):
        del (records := dict(run.arms))[missing]
        with pytest.raises(ValueError, match=f"it does not have {missing}, with which others are compared"):
            read_back(RunFile(run.path, run.header, records))


@pytest.mark.parametrize(
    ("arms_of_preset", "reason"),
    [
        (
            "mine = {}",
            "the preset has no arm 'ar', with which others are compared: add it, or name another arm with baseline",
        ),
        ("ar = {}\nmine = { baseline = 'no' }", "arm 'mine': its reference arm 'no' is no arm of the preset"),
        (
            "ar = {}\na = { baseline = 'b' }\nb = { baseline = 'c' }\nc = {}",
            "arm 'a': its reference arm 'b' has one of its own: compare both with the same arm",
        ),
    ],
)
def test_a_wrong_baseline_is_told_in_one_sentence(arms_of_preset: str, reason: str) -> None:
    """Guards against a wrong baseline that ends in a traceback after the models are loaded."""
    preset: Preset = parse(f"prompts = 'prose:1'\nmax_new_tokens = 4\nrepeats = 1\n[arms]\n{arms_of_preset}", "p")
    with pytest.raises(ValueError, match="arm") as error:
        preset.check_baselines()
    assert reason in str(error.value)
