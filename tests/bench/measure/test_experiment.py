from __future__ import annotations

import dataclasses
import gc
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from specdecode import LM, Costs, generate
from specdecode.backends.graph import MOST_CAPTURING_RUNS, CudaGraphs
from specdecode.bench import presets
from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.callables import NO_MEMORY, ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.gate.history import History
from specdecode.bench.measure.check import classify
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.measure.output_stats import own_losses
from specdecode.bench.measure.speed_session import measure
from specdecode.bench.options import Options
from specdecode.bench.plan import resolve
from specdecode.bench.presets import preset
from specdecode.bench.report.comment import comment
from specdecode.bench.report.tables import speed_table
from specdecode.bench.runs.counts import Counts, as_dict
from specdecode.bench.runs.records import RunFile
from specdecode.controllers.base import Limit
from specdecode.controllers.cost_aware import DraftCost
from specdecode.heads import loading
from tests.helpers.characters import save
from tests.helpers.heads import write_head
from tests.helpers.models import ARCHITECTURES, build, lm, prompt, quantisable, small
from tests.helpers.root import ROOT
from tests.helpers.speed_runs import run_of_results
from tests.helpers.spelling import CHARACTERS, characters

LENGTH = 20
PROMPTS = {"a": list(prompt()), "b": list(prompt(9))}


class Calls:
    """Arms with set outputs that claim a set time and take none."""

    def __init__(self) -> None:
        self.order: list[tuple[str, int, int]] = []
        self.collecting: list[bool] = []
        self.searched: list[int] = []
        self.everything = 0

    def arm(self, name: str, seconds: float, wrong: bool = False) -> Arm:
        def run(text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
            self.order.append((name, len(text), length))
            if length == LENGTH:
                self.collecting.append(gc.isenabled())
                self.searched.append(len(gc.get_objects()))
            tokens = generate(lm("llama"), text, max_new_tokens=length).tokens
            if wrong:
                # The least likely token: rounding cannot make it the choice.
                tokens[-1] = int(_logits(lm("llama"), [*text, *tokens[:-1]]).argmin())
            return Run(tokens, seconds * len(self.order) ** 0.01, 0.25 * seconds, Counts(steps=length))

        return Arm(name, run, lm("llama"), peer=True)


def _logits(target: LM, text: list[int]) -> torch.Tensor:
    return target.forward(target.new_slots(1), torch.tensor(text))[-1]


@pytest.fixture(scope="module")
def calls() -> Calls:
    return Calls()


def kept(results: Results) -> RunFile:
    return run_of_results(results, LENGTH)


@pytest.fixture(scope="module")
def results(calls: Calls) -> Results:
    arms = [calls.arm("ar", 1.0), calls.arm("twice", 0.5), calls.arm("half", 2.0), calls.arm("liar", 0.1, wrong=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdecode.bench.measure.block.gc", gc)
        gc.unfreeze()  # as in a user's session
        done = experiment(arms, PROMPTS, max_new_tokens=LENGTH, repeats=3)
    calls.everything = len(gc.get_objects())
    return done


def test_every_block_begins_and_ends_with_the_baseline(results: Results, calls: Calls) -> None:
    """Guards against arms timed against a baseline of another moment, and against an order that favours one arm."""
    counted = {name for name, _, length in calls.order if 1 < length < LENGTH}
    assert counted == {"ar", "twice", "half", "liar"}
    timed = [(name, text) for name, text, length in calls.order if length == LENGTH]
    blocks = [timed[i : i + 6] for i in range(0, len(timed), 6)]
    assert len(blocks) == 6
    for block in blocks:
        assert block[0][0] == block[2][0] == block[-1][0] == "ar"
        assert {name for name, _ in (block[1], *block[3:-1])} == {"twice", "half", "liar"}
        assert len({length for _, length in block}) == 1
    assert len({tuple(name for name, _ in block) for block in blocks}) > 1
    assert not any(calls.collecting)
    assert gc.isenabled()


def test_the_progress_names_what_runs() -> None:
    """Guards against a progress that names the work of before, for as long as the outputs to compare with take."""
    told: list[str] = []

    def noted(name: str) -> Arm:
        arm, during = Calls().arm(name, 1.0), []
        during_of[name] = during

        def run(text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
            during.append(told[-1])
            return arm.run(text, length, expected)

        return dataclasses.replace(arm, run=run)

    during_of: dict[str, list[str]] = {}
    counts: list[tuple[int, int]] = []

    def progress(done: int, total: int, doing: str) -> None:
        told.append(doing)
        counts.append((done, total))

    experiment([noted("ar"), noted("other")], {"a": PROMPTS["a"]}, LENGTH, progress=progress)
    assert counts == [(done, len(counts) - 1) for done in range(len(counts))]
    expected, counters = "expected outputs on a", "{} on a, the counters run"
    assert during_of["ar"] == [expected, counters.format("ar"), expected, "ar on a", "ar on a"]
    assert during_of["other"] == [counters.format("other"), "other on a"]


@pytest.mark.usefixtures("results")
def test_only_the_first_collection_searches_all_objects(calls: Calls) -> None:
    """Guards against a collection before each run that takes longer than the run: PyTorch has very many objects. After
    the experiment everything is searched again.
    """
    assert calls.everything > 100_000
    assert max(calls.searched) < calls.everything / 10


def test_speedups_are_paired_within_blocks(results: Results) -> None:
    """Guards against a speedup as a ratio of totals. The fake times drift, but their ratios within a block do not."""
    run = kept(results)
    assert run.speedup("twice").value == pytest.approx(2.0, rel=0.01)
    assert run.speedup("half").value == pytest.approx(0.5, rel=0.01)
    assert run.speedup("twice", over="half").value == pytest.approx(4.0, rel=0.01)
    assert run.speedup("ar").value == 1.0
    assert results.floor > 0


def test_an_arm_is_compared_with_the_baseline_beside_it(results: Results) -> None:
    """Guards against later arms of a block that look slower because the machine slows down."""
    for block in results.blocks:
        beats = [block.runs["ar"], block.middle, block.last["ar"]]
        times = [run.s_per_token for run in beats if run is not None]
        assert times == sorted(times)  # the fake machine gets slower
        for arm in ("twice", "half"):
            means = [math.sqrt(first * second) for first, second in pairwise(times)]
            assert any(block.runs[arm].beside_s == pytest.approx(mean, rel=1e-12) for mean in means)
        assert block.noise("ar") == pytest.approx(math.log(times[0] * times[2] / times[1] ** 2) / 2)


@pytest.mark.parametrize(("in_turns", "timed"), [(False, 2), (True, 1)])
def test_an_arm_that_captures_in_each_run_is_counted(
    in_turns: bool, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against times with captures or compilations in them that nobody knows of."""
    plain = make_arm("ar", {}, lm("llama"), None, "eager")

    def run(*given: Any) -> Run:
        CudaGraphs.count += 1
        return plain.run(*given)

    monkeypatch.setattr(CudaGraphs, "count", 0)
    capturing = dataclasses.replace(plain, run=run, foreign=True)
    results = experiment([capturing], {"a": list(prompt())}, 2, in_turns=in_turns)
    assert results.records()["ar"].captured == timed
    # Beside the timed runs: before all blocks, the counters run, and for the expected output.
    assert CudaGraphs.count == 3 + timed * MOST_CAPTURING_RUNS
    first = results.blocks[0].runs["ar"]
    assert Run.from_json(first.as_json()) == first


def test_a_baseline_that_is_wrong_in_between_is_wrong() -> None:
    """Guards against a wrong output that nobody checks: the middle baseline run appears in no table."""
    calls = Calls()
    right, lying = calls.arm("ar", 1.0), calls.arm("ar", 1.0, wrong=True)
    timed = iter([right, lying, right])

    def run(text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        return (next(timed) if length == LENGTH else right).run(text, length, expected)

    arms = [dataclasses.replace(right, run=run), calls.arm("one", 1.0), calls.arm("two", 1.0)]
    assert experiment(arms, {"a": PROMPTS["a"]}, max_new_tokens=LENGTH).wrong("ar") == ["a"]


def test_a_time_from_a_wrong_output_is_void(results: Results) -> None:
    """Guards against a wrong arm that wins as the fastest one."""
    run = kept(results)
    assert results.wrong("liar") == [*PROMPTS] * 3
    assert run.arms["liar"].rows == {}
    assert as_dict(run.measures("liar")).keys() == {"bugs", "ties", "synthetic", "lossy"}
    assert run.measures("liar").bugs == 6
    assert results.wrong("twice") == []


def test_repeats_are_summed_and_measures_are_plain_numbers(results: Results) -> None:
    """Guards against tensors and NumPy scalars, which pytest-benchmark stores as text, and against lost repeats."""
    run = kept(results)
    measures = as_dict(run.measures("twice"))
    assert {type(value) for value in measures.values()} == {float}
    assert measures["ttft_s"] == pytest.approx(0.125)
    assert measures["mean_acceptance_length"] == 1.0
    assert {(row.counts.runs, row.counts.tokens) for row in run.arms["twice"].rows.values()} == {(3, 3 * LENGTH)}
    assert measures["throughput"] == pytest.approx(6 * LENGTH / sum(results.durations("twice")))


def test_an_empty_output_fails_its_arm_alone() -> None:
    """Guards against a session that ends in a traceback, because the first token of a server's output ended it."""
    ended = Run([], 1.0, 0.1, Counts(steps=1))
    arms = [Calls().arm("ar", 1.0), Arm("silent", lambda *_: ended, target=lm("llama"), foreign=True)]
    run = run_of_results(experiment(arms, PROMPTS, LENGTH), LENGTH)
    assert (run.arms["silent"].failure, run.arms["ar"].failure) == ("arm 'silent': its output is empty", "")
    with pytest.raises(ArmError, match="arm 'silent': its output is empty"):
        experiment(arms, PROMPTS, LENGTH, baseline="silent")


def test_an_output_of_another_length_is_wrong() -> None:
    """Guards against an output that is cut short and passes because no token differs."""
    tokens = generate(lm("llama"), prompt(), max_new_tokens=8).tokens
    assert classify(lm("llama"), prompt(), tokens, tokens) == "equal"
    assert classify(lm("llama"), prompt(), tokens, tokens[:-1]) == "bug"
    # A model that has no positions beyond its context.
    full = prompt(lm("gpt-2").context_length - 2)
    first, second = generate(lm("gpt-2"), full, max_new_tokens=2).tokens
    assert classify(lm("gpt-2"), full, [first, second], [first, second + 1]) == "bug"


@pytest.mark.parametrize("beyond", [-1, 10_000])
def test_an_id_that_is_no_token_is_wrong(beyond: int) -> None:
    """Guards against an id from code or a server, such as one for padding, that ends the session with an IndexError."""
    target = lm("llama")
    tokens = generate(target, prompt(), max_new_tokens=4).tokens
    padded = [*tokens[:3], beyond]
    assert classify(target, prompt(), tokens, padded) == "bug"
    assert classify(target, prompt(), [beyond, 1], [beyond, 2]) == "bug"
    assert own_losses(target, prompt(), tokens) is not None
    assert own_losses(target, prompt(), padded) is None


def test_a_choice_within_the_rounding_is_a_tie_and_no_more() -> None:
    """Guards against a wrong token excused as rounding: an output may differ only where the target itself is undecided.

    Two tokens have almost the same embedding, so that in bfloat16 their logits differ by less than the noise.
    """
    model = build(ARCHITECTURES["llama"] | {"tie_word_embeddings": False}).to(torch.bfloat16)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    target = LM(model)
    first = generate(target, prompt(), max_new_tokens=1).tokens[0]
    twin = (first + 1) % target.vocab_size
    with torch.no_grad():
        head.weight[twin] = head.weight[first]
    worst = int(_logits(target, list(prompt())).argmin())
    assert classify(target, prompt(), [first], [twin]) == "tie"
    assert classify(target, prompt(), [first], [worst]) == "bug"


@pytest.fixture
def headed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LM:
    """Return a target that comes with a head, and that can be quantised."""
    target = LM(build(quantisable("llama")), characters(), name="llama")
    monkeypatch.setattr(loading, "shipped_head", {target.name: write_head(target, tmp_path)}.get)
    return target


def test_every_arm_of_every_preset_gives_the_baselines_tokens(headed: LM, unchecked: None) -> None:
    """Guards against a measured arm whose output was never right, peers included."""
    target = headed
    draft = target.subset([0, 1, 3])
    for name in ("quick", "synthetic"):
        entries = preset(name).arms
        arms = [make_arm(arm, options, target, draft) for arm, options in entries.items()]
        results = experiment(arms, PROMPTS, max_new_tokens=16)
        for arm in entries:
            runs = [block.runs[arm] for block in results.blocks]
            assert [block.checks[arm] for block in results.blocks] == ["equal", "equal"], arm
            assert all(0 < run.ttft_s <= run.total_s for run in runs), arm
            assert all(len(run.tokens) == 16 for run in runs), arm
            ours = [run for run in runs if "peer" not in entries[arm]]
            parts = [run.seconds.draft + run.seconds.verify + run.seconds.overhead for run in ours]
            assert parts == pytest.approx([run.total_s for run in ours]), arm
            assert all(run.seconds.verify > run.seconds.later_verify > 0 for run in ours), arm


def test_a_session_measures_a_draft_of_another_vocabulary(tmp_path: Path) -> None:
    """Guards against a session that refuses a draft of another vocabulary though no arm needs equal vocabularies."""
    preset_ = tmp_path / "text.toml"
    preset_.write_text(
        'prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 1\n[arms]\nar = {}\nby-text = { drafter = "universal" }\n'
    )
    target, draft = save(tmp_path / "target"), save(tmp_path / "draft", texts=CHARACTERS[::-1])
    options = Options(root=tmp_path, preset=str(preset_), target=str(target), draft=str(draft), device="cpu")
    judged = measure(resolve(options), {"by-text"})
    assert judged.wrong["by-text"] == []
    assert judged.run.measures("by-text").counters.acceptance_rate >= 0.0


def test_a_session_reads_the_history_of_its_baseline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against dozens of calls of git at each look of `--until`."""
    asked: list[Path] = []

    def counted(file: Path, **named: int) -> History:
        asked.append(file)
        return History([], "none")

    monkeypatch.setattr("specdecode.bench.gate.verdicts.history", counted)
    preset_ = tmp_path / "own.toml"
    preset_.write_text('prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 1\n[arms]\nar = {}\n')
    baseline = next((ROOT / "baselines" / "any").glob("*.json"))
    models = {"target": str(save(tmp_path / "target")), "device": "cpu"}
    limits = {"until": 0.9, "budget_minutes": 0.05}
    measure(resolve(Options(root=tmp_path, preset=str(preset_), baseline=str(baseline), **models, **limits)), {"ar"})
    assert asked == [baseline]


def test_a_lossy_arm_is_checked_against_plain_decoding_with_its_cache(unchecked: None) -> None:
    """Guards against a lossy arm that passes with any output, and against one that can never be right."""
    target = lm("llama")
    cache = {"policy": "sink-window", "cache": 16}
    entries = {"ar": {}, "windowed": cache, "windowed-lookup": {"drafter": "lookup", **cache}}
    entries["replayed"] = {"drafter": "model", "replay": 0.9, **cache}
    arms = [make_arm(name, options, target, target.subset([0])) for name, options in entries.items()]
    results = experiment(arms, PROMPTS, max_new_tokens=40)
    run = kept(results)
    assert [record.bugs for record in run.arms.values()] == [0, 0, 0, 0]
    assert [record.lossy for record in run.arms.values()] == [False, True, True, True]
    tokens = {arm: results.blocks[0].runs[arm].tokens for arm in entries}
    assert tokens["windowed"] == tokens["windowed-lookup"] == tokens["replayed"] != tokens["ar"]
    assert run.measures("replayed").counters.acceptance_rate > 0.5
    assert run.arms["windowed"].rows["a"].counts.compressions > 3

    full = make_arm("liar", {}, target, None)
    liar = dataclasses.replace(full, policy=arms[1].policy)
    assert experiment([arms[0], liar], PROMPTS, max_new_tokens=40).wrong("liar") == ["a", "b"]


def test_a_lossy_arm_without_memory_for_its_own_reference_fails_alone(
    monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """Guards against a session that ends because a lossy arm needs more memory than there is, at the full length."""

    def full(target: LM, text: Sequence[int], *, max_new_tokens: int, **rules: Any) -> Any:
        if max_new_tokens == 24:
            raise torch.OutOfMemoryError
        return generate(target, text, max_new_tokens=max_new_tokens, **rules)

    monkeypatch.setattr("specdecode.bench.arms.arm.generate", full)
    cache = {"policy": "sink-window", "cache": 16}
    entries = {"ar": {}, "windowed": cache, "other": {"baseline": "windowed"}, "lookup": {"drafter": "lookup"}}
    arms = [make_arm(name, options, lm("llama"), None) for name, options in entries.items()]
    results = experiment(arms, PROMPTS, max_new_tokens=24)
    assert results.failures == {
        "windowed": f"arm 'windowed': {NO_MEMORY}",
        "other": "arm 'other': its reference arm windowed did not decode",
    }
    assert [set(block.runs) for block in results.blocks] == [{"ar", "lookup"}] * 2


def test_a_peer_that_cannot_compile_fails_alone(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Guards against a session that is lost on a machine without a compiler."""
    target = small(num_hidden_layers=1)
    usual = target.model.generate

    def uncompiled(*given: Any, past_key_values: Any = None, **others: Any) -> Any:
        if past_key_values is not None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")
        return usual(*given, **others)

    monkeypatch.setattr(target.model, "generate", uncompiled)
    entries = {"ar": {}, "hf-generate": {"peer": "generate"}, "hf-compiled": {"peer": "generate-compiled"}}
    arms = [make_arm(name, options, target, None) for name, options in entries.items()]
    results = experiment(arms, PROMPTS, max_new_tokens=4)
    reason = "transformers cannot compile its forward here: Failed to find C compiler."
    assert results.failures == {"hf-compiled": f"arm 'hf-compiled': {reason}"}
    assert [set(block.runs) for block in results.blocks] == [{"ar", "hf-generate"}] * 2


def test_an_int8_arm_is_checked_against_plain_decoding_of_the_int8_target(unchecked: None) -> None:
    """Guards against an INT8 arm that passes with any output or decodes the unquantised target, and against a missing
    or wrong agreement with `ar`.
    """
    target = lm("llama")
    rough, draft = target.quantized("int8"), target.subset([0, 1, 3])
    int8 = {"quantize": "int8"}
    entries = {"ar": {}, "ar-int8": int8, "linear-int8": {"drafter": "model", "k": 3, **int8}}
    entries |= {"batch-int8": {"batch": 2, **int8}, "hf-int8": {"peer": "generate", **int8}}
    entries["windowed-int8"] = {"policy": "sink-window", "cache": 16, **int8}
    arms = [make_arm(name, options, target, draft) for name, options in entries.items()]
    assert [arm.target is rough for arm in arms] == [arm.lossy for arm in arms] == [False] + [True] * 5
    arms.append(dataclasses.replace(arms[0], name="liar", target=rough, quantize="int8"))
    results = experiment(arms, PROMPTS, max_new_tokens=24)
    run = kept(results)
    assert [record.bugs for record in run.arms.values()] == [0] * 6 + [2]
    tokens = {arm.name: results.blocks[0].runs[arm.name].tokens for arm in arms}
    assert all(tokens[arm] == tokens["ar-int8"] for arm in ("linear-int8", "batch-int8", "hf-int8"))
    assert len({tuple(tokens[arm]) for arm in ("ar", "ar-int8", "windowed-int8")}) == 3

    shared = 0
    for block in results.blocks:
        pairs = enumerate(zip(block.runs["ar"].tokens, block.runs["ar-int8"].tokens, strict=True))
        shared += next(place for place, (a, b) in pairs if a != b)
    assert shared > 0
    assert run.measures("linear-int8").agreement == pytest.approx(shared / 48)
    assert run.measures("ar").agreement == 1.0
    assert run.measures("linear-int8").counters_run.weight_bytes == rough.weight_bytes < target.weight_bytes
    assert run.measures("ar").counters_run.weight_bytes == target.weight_bytes


def test_a_tie_of_an_int8_arm_is_a_tie_of_the_int8_target() -> None:
    """Guards against a tie of an INT8 arm judged by the margin or noise of the unquantised target.

    Two tokens have output weights that differ, but so little that their INT8 values are equal.
    """
    model = build(ARCHITECTURES["llama"] | {"tie_word_embeddings": False}).float()
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    first = generate(LM(model), prompt(), max_new_tokens=1).tokens[0]
    twin = (first + 1) % head.out_features
    with torch.no_grad():
        scale = head.weight[first].abs().max() / 127.5
        head.weight[twin] = head.weight[first] = (head.weight[first] / scale).round().clamp(-127, 127) * scale
        head.weight[twin, head.weight[twin].abs() < 50 * scale] += 0.2 * scale
    target = LM(model)
    both = {first, twin}
    expected = generate(target.quantized("int8"), prompt(), max_new_tokens=1).tokens[0]
    assert expected in both

    def run(text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        return Run([*(both - set(expected))], 1.0, 0.5, Counts(steps=1))

    arms = [make_arm("ar", {}, target, None), Arm("twin", run, target.quantized("int8"), quantize="int8")]
    results = experiment(arms, {"a": list(prompt())}, max_new_tokens=1)
    assert results.blocks[0].checks["twin"] == "tie"
    assert classify(target, prompt(), [first], [twin]) == "bug"


def test_the_presets_are_of_known_parts(headed: LM) -> None:
    """Guards against a wrong preset that nobody notices before it is measured."""
    for file in Path(presets.__file__).with_name("presets").glob("*.toml"):
        # Compiling takes minutes, and Triton may not be installed. Transformers refuses drafts of the same vocabulary.
        entries = {
            arm: options | {"backend": "eager"} if options.get("backend") in ("compile", "triton") else options
            for arm, options in preset(file.stem).arms.items()
            if options.get("peer") != "universal"
        }
        arms = {arm: make_arm(arm, options, headed, headed) for arm, options in entries.items()}
        assert all(arm.against is None or arm.against in preset(file.stem).arms for arm in arms.values())
        assert "ar" in arms


@pytest.mark.usefixtures("unchecked")
def test_arms_draft_as_long_as_their_controllers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a controller that keeps its state from the run before, against costs measured inside a timed run,
    and against gated counters that depend on the clock.
    """
    target, measured = small(num_hidden_layers=2), []

    def measure(*of: object) -> Costs:
        measured.append(of)
        return Costs({1: 1.0}, {Limit(1): DraftCost(1, 0.0), Limit(5): DraftCost(5, 0.0)})

    monkeypatch.setattr("specdecode.bench.arms.parts.measure_costs", measure)
    entries = {"ar": {}, "fixed": {"drafter": "lookup", "k": 5}}
    entries |= {kind: {"drafter": "model", "controller": kind} for kind in ("adaptive", "cost-aware")}
    arms = [make_arm(name, options, target, target.subset([0])) for name, options in entries.items()]
    assert len(measured) == 1
    results = experiment(arms, PROMPTS, max_new_tokens=24, repeats=2)
    assert len(measured) == 1
    for block in results.blocks:
        assert set(block.checks.values()) == {"equal"}
        assert len([steps for steps in block.runs["adaptive"].histograms.depth if steps]) > 1
    once, again = ([block.runs["adaptive"] for block in results.blocks if block.repeat == repeat] for repeat in (0, 1))
    assert [run.counts for run in once] == [run.counts for run in again]
    timed = {name: record.timed for name, record in kept(results).arms.items()}
    assert timed == {"ar": False, "fixed": False, "adaptive": False, "cost-aware": True}


def test_synthetic_rows_say_so_in_every_table() -> None:
    """Guards against a set acceptance rate shown as a model's own."""
    target = lm("llama")
    entries = {"ar": {}, "lookup": {"drafter": "lookup"}, "replayed": {"drafter": "model", "replay": 0.5}}
    arms = [make_arm(name, options, target, target) for name, options in entries.items()]
    results = kept(experiment(arms, PROMPTS, max_new_tokens=4))
    table = io.StringIO()
    Console(file=table, width=130).print(speed_table(results))
    for text in (table.getvalue(), comment(results, "title", "no baseline", [])):
        assert text.count("(synthetic)") == 1
        assert "replayed (synthetic)" in text
    assert [results.measures(arm).synthetic for arm in entries] == [0.0, 0.0, 1.0]
