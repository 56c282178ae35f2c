"""Arms from code: a user's own functions, timed and checked beside this package's arms."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from specdecode import generate
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.callables import ArmError, ArmStep
from specdecode.bench.arms.run import Run
from specdecode.bench.gate.history import History
from specdecode.bench.measure.experiment import experiment
from specdecode.bench.report.captions import outputs
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.markdown import markdown
from specdecode.bench.runs.records import RunFile
from tests.helpers.models import lm, prompt
from tests.helpers.speed_runs import run_of_results

LENGTH, LONGER = 12, 20  # LONGER than the counters run
PROMPTS = {"set/0": list(prompt()), "set/1": list(prompt(9))}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of the user's to put factories into."""
    made = ModuleType("reader")
    monkeypatch.setitem(sys.modules, "reader", made)
    return made


def right(prompt: list[int], count: int) -> list[int]:
    return generate(lm("llama"), prompt, max_new_tokens=count).tokens


def arm(decode: Any, module: ModuleType, lengths: tuple[int, ...] = (), **entry: Any) -> Any:
    module.make = lambda *names, **options: decode  # type: ignore[attr-defined]
    return make_arm("mine", {"call": "reader:make", **entry}, lm("llama"), None, lengths=lengths)


def test_a_function_decodes_as_an_arm(module: ModuleType) -> None:
    """Guards against recorded tokens, steps or lengths that differ from the yielded ones."""
    asked = []

    def make(target: str, draft: str, device: str, dtype: str, width: int) -> Any:
        asked.append((target, draft, device, dtype, width))

        def decode(prompt: list[int], count: int) -> Iterator[list[int]]:
            tokens = right(prompt, count)
            for start in range(0, count, width):
                yield tokens[start : start + width]

        return decode

    module.make = make  # type: ignore[attr-defined]
    made = make_arm("mine", {"call": "reader:make", "options": {"width": 5}}, lm("llama"), None, lengths=(7,))
    assert asked == [("llama", "", str(lm("llama").device), "float64", 5)]
    run = made.run(prompt(), LENGTH, ())
    assert run.tokens == right(list(prompt()), LENGTH)
    assert run.counts.steps == 3
    assert run.counts.drafted is None
    assert 0 < run.ttft_s < run.total_s
    (cut,) = run.cuts
    assert (cut.tokens, cut.counts.steps) == (run.tokens[:7], 2)
    assert run.ttft_s == cut.ttft_s < cut.total_s < run.total_s


def test_what_its_steps_know_is_counted(module: ModuleType) -> None:
    """Guards against a reported acceptance, time or size that is lost, and against one that is invented where none was
    reported.
    """

    def decode(prompt: list[int], count: int) -> Iterator[ArmStep]:
        tokens = right(prompt, count)
        for place, start in enumerate(range(0, count, 3)):
            some = tokens[start : start + 3]
            # Of the types that engines count in.
            seconds, size = torch.tensor(0.25), np.int64(100 + place)
            accepted = torch.tensor(len(some) - 1)
            yield ArmStep(some, np.int32(4), accepted, 4, draft_s=seconds, verify_s=np.float32(0.5), cache_bytes=size)  # type: ignore[arg-type]

    run = arm(decode, module).run(prompt(), LENGTH, ())
    assert Run.from_json(json.loads(json.dumps(run.as_json()))) == run
    assert (run.counts.steps, run.counts.drafted, run.counts.accepted, run.counts.draft_forwards) == (4, 16, 8, 16)
    assert (run.counts.rejections, run.counts.later_tokens) == (4, 9)
    assert (run.counts.cache_bytes, run.counts.peak_cache_bytes, run.counts.grown_bytes) == (103, 103, 3)
    assert (run.seconds.draft, run.seconds.verify, run.seconds.later_draft, run.seconds.later_verify) == (
        1,
        2,
        0.75,
        1.5,
    )
    assert run.histograms.accepted == [0, 0, 4]
    assert run.histograms.depth == [0, 0, 0, 0, 4]

    def knows_less(prompt: list[int], count: int) -> Iterator[ArmStep]:
        for place, token in enumerate(right(prompt, count)):
            yield ArmStep([token], drafted=place or None)

    run = arm(knows_less, module).run(prompt(), LENGTH, ())
    assert (run.counts.drafted, run.counts.accepted, run.seconds.draft) == (None, None, None)
    assert run.histograms.accepted == []


def test_an_engine_that_calls_back_tells_when_tokens_came(module: ModuleType) -> None:
    """Guards against a TTFT as long as the whole run, for an engine that returns only at the end but reports token
    times.
    """

    def decode(prompt: list[int], count: int) -> Iterator[ArmStep]:
        tokens = right(prompt, count)
        time.sleep(0.05)
        yield ArmStep(tokens[:4], at_s=torch.tensor(0.01, dtype=torch.float64))  # type: ignore[arg-type]
        yield ArmStep(tokens[4:], at_s=0.03)

    run = arm(decode, module, lengths=(4,)).run(prompt(), LENGTH, ())
    assert (run.ttft_s, type(run.ttft_s)) == (0.01, float)
    assert run.cuts[0].total_s == 0.01
    assert run.total_s > 0.05


def hang(prompt: list[int], count: int) -> Iterator[list[int]]:
    while True:
        time.sleep(0.01)
        yield []


def broken(prompt: list[int], count: int) -> Iterator[list[int]]:
    yield right(prompt, 1)
    raise KeyError("no such kernel")


FAILING = {
    "too-many": (lambda prompt, count: [right(prompt, count + 2)], "it yielded 2 token(s) more than it was asked for"),
    "too-few": (lambda prompt, count: [right(prompt, count)[:-1]], "it yielded {less} of {count} tokens"),
    "nothing": (lambda prompt, count: iter(()), "it yielded 0 of {count} tokens"),
    "raises": (broken, "it raised KeyError: 'no such kernel'"),
    "hangs": (hang, "it took longer than 0.2 s, its limit_s: set a larger one"),
    "text": (lambda prompt, count: ["text"], "it yielded 'text': yield a list of token ids, or an ArmStep"),
    "padding": (lambda prompt, count: [[-1]], "it yielded [-1]: yield a list of token ids, or an ArmStep"),
    "floats": (lambda prompt, count: [[1.0]], "it yielded [1.0]: yield a list of token ids, or an ArmStep"),
    "late": (
        lambda prompt, count: [ArmStep(right(prompt, count), at_s=99.0)],
        "at_s is 99: it must lie between the step before and the yield of this step",
    ),
    "counts-its-bonus": (
        lambda prompt, count: [ArmStep(right(prompt, count), drafted=count - 1, accepted=count)],
        "accepted is {count}: it is at most drafted, and at most the number of new tokens; the target's own token does"
        " not count",
    ),
    "accepts-more-than-it-yields": (
        lambda prompt, count: [ArmStep([], drafted=4, accepted=1), right(prompt, count)],
        "accepted is 1: it is at most drafted, and at most the number of new tokens; the target's own token does not"
        " count",
    ),
    "half": (
        lambda prompt, count: [ArmStep(right(prompt, count), drafted=0.5)],
        "drafted is 0.5: it must be a whole number, 0 or more",
    ),
    "no-time": (
        lambda prompt, count: [ArmStep(right(prompt, count), draft_s=float("nan"))],
        "draft_s is nan: it must be a number of seconds, 0 or more",
    ),
    "no-steps": (lambda prompt, count: 3, "it raised TypeError: 'int' object is not iterable"),
}


@pytest.mark.parametrize("name", list(FAILING))
def test_what_does_not_decode_is_told_and_the_others_go_on(name: str, module: ModuleType) -> None:
    """Guards against a whole run that is lost because a user's code fails, and against a failing arm that passes."""
    decode, reason = FAILING[name]
    reason = reason.format(less=LONGER - 1, count=LONGER)
    closed = []

    class Decode:
        def __call__(self, prompt: list[int], count: int) -> Any:
            # Fail in the timed runs alone: the counters run is shorter.
            return decode(prompt, count) if count == LONGER else [right(prompt, count)]

        def close(self) -> None:
            closed.append(name)

    mine = arm(Decode(), module, limit_s=0.2 if name == "hangs" else 60.0)
    with pytest.raises(ArmError, match="arm 'mine'"):
        mine.run(prompt(), LONGER, ())
    others = [make_arm(other, {}, lm("llama"), None, "eager") for other in ("ar", "plain")]
    told: list[str] = []
    results = experiment([*others, mine], PROMPTS, LONGER, progress=lambda done, total, doing: told.append(doing))
    assert closed == [name]
    run = run_of_results(results, LONGER)
    assert run.arms["mine"].failure == f"arm 'mine': {reason}"
    assert not run.arms["mine"].rows
    assert len(run.arms["plain"].rows) == 2
    assert sum(doing.startswith("mine on set/") for doing in told) == 2  # the counters run, and one more
    assert outputs(run, "mine") == "FAILED"
    assert "FAILED" in markdown(run, "a title", "", [], History([], ""))
    assert "mine did not decode" in document("a title", section(run, "a title", "", []))


def test_a_wrong_token_voids_its_times(module: ModuleType) -> None:
    """Guards against a wrong decoder that wins as the fastest one."""

    def decode(prompt: list[int], count: int) -> Iterator[list[int]]:
        tokens = right(prompt, count)
        logits = lm("llama").forward(lm("llama").new_slots(1), _tensor([*prompt, *tokens[:-1]]))[-1]
        yield [*tokens[:-1], int(logits.argmin())]

    arms = [make_arm("ar", {}, lm("llama"), None, "eager"), arm(decode, module)]
    record = run_of_results(experiment(arms, PROMPTS, LENGTH), LENGTH).arms["mine"]
    assert (record.bugs, record.rows, record.failure) == (2, {}, "")


def test_a_lossy_function_may_write_other_tokens(module: ModuleType) -> None:
    """Guards against an engine that rounds differently and so can never be timed, and against a lossy one shown as
    exact.
    """

    def decode(prompt: list[int], count: int) -> Iterator[list[int]]:
        tokens = right(prompt, count)
        yield [*tokens[: count // 2], *((token + 1) % 64 for token in tokens[count // 2 :])]

    arms = [make_arm("ar", {}, lm("llama"), None, "eager"), arm(decode, module, lossy=True)]
    run = run_of_results(experiment(arms, PROMPTS, LENGTH), LENGTH)
    assert (run.arms["mine"].bugs, len(run.arms["mine"].rows), run.arms["mine"].lossy) == (0, 2, True)
    assert outputs(run, "mine") == "lossy 50%"


def _tensor(tokens: list[int]) -> Any:
    import torch

    return torch.tensor(tokens)


def test_a_function_is_as_fast_as_it_is(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a clock that runs outside the arm's own work, or stops during it."""
    slept_s, real = 0.0, time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + slept_s)

    def decode(prompt: list[int], count: int) -> Iterator[list[int]]:
        nonlocal slept_s
        tokens = right(prompt, count)
        slept_s += 0.8
        yield tokens

    arms = [make_arm("ar", {}, lm("llama"), None, "eager"), arm(decode, module)]
    run: RunFile = run_of_results(experiment(arms, PROMPTS, LENGTH), LENGTH)
    assert run.speedup("mine").high < 1  # so slow that also the wide interval of two prompts on a busy machine tells
    assert min(row.seconds.total for row in run.arms["mine"].rows.values()) > 0.8


def test_a_limit_of_time_leaves_others_alone(module: ModuleType) -> None:
    """Guards against an arm from code that cancels the time limit of the whole test, such as pytest-timeout's."""
    handler, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        arm(lambda prompt, count: [right(prompt, count)], module).run(prompt(), LENGTH, ())
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"call": "reader"}, "call is 'reader': write package.module:function"),
        ({"call": "reader:make", "k": 3}, "it has unknown options: k; choose from call, options, limit_s"),
        ({"call": "reader:make", "limit_s": 0}, "limit_s is 0: it must be above 0"),
        ({"call": "reader:make", "options": 3}, "options is 3: it must be a table of options"),
        ({"drafter": "lookup", "limit_s": 0}, "limit_s is for arms from code or of servers: leave it out"),
        ({"drafter": "lookup", "lossy": True}, "lossy is for arms from code or of servers: leave it out"),
        ({"call": "reader:make", "lossy": 1}, "lossy is 1: it must be true or false"),
        ({"drafter": "lookup", "limit_s": 3}, "limit_s is for arms from code or of servers: leave it out"),
        ({"call": "no.such:make"}, "no.such:make cannot be imported: ModuleNotFoundError: No module named 'no'"),
        (
            {"call": "reader:missing"},
            "reader:missing cannot be imported: AttributeError: module 'reader' has no attribute 'missing'",
        ),
        ({"call": "broken_reader:make"}, "broken_reader:make cannot be imported: SyntaxError: '(' was never closed"),
        ({"call": "reader:raises"}, "reader:raises raised RuntimeError: no licence"),
        ({"call": "reader:nothing"}, "reader:nothing returned a NoneType: return a function that decodes"),
    ],
)
def test_a_wrong_entry_is_told_in_one_sentence(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], reason: str
) -> None:
    """Guards against a traceback, from the user's module or from this package, instead of one sentence."""
    (tmp_path / "broken_reader.py").write_text("make = (\n")
    monkeypatch.syspath_prepend(tmp_path)

    def raises(*names: str) -> None:
        raise RuntimeError("no licence")

    module.raises, module.nothing = raises, lambda *names: None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="arm 'mine'") as error:
        make_arm("mine", entry, lm("llama"), None)
    assert reason in str(error.value)


def test_a_change_of_its_code_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a resumed run that mixes blocks of two versions of a user's decoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    digests = []
    for text in ("def make(*names): return print\n", "def make(*names): return len\n"):
        (tmp_path / "readers_decoder.py").write_text(text)
        monkeypatch.delitem(sys.modules, "readers_decoder", raising=False)
        digests.append(make_arm("mine", {"call": "readers_decoder:make"}, lm("llama"), None).code)
    assert len({*digests, ""}) == 3
