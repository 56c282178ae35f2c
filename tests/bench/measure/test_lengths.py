"""A run in parts: at shorter lengths, task by task, and the statistics of its output texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from specdecode import FixedK, Generation, PromptLookup, SinkWindow, generate
from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.block import Block, measure_block
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.measure.journal import Journal
from specdecode.bench.measure.output_stats import own_losses, repeated, with_output_stats
from specdecode.bench.presets import preset
from specdecode.bench.report.captions import outputs
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.tables import by_part
from specdecode.bench.runs.counts import Counts, Latencies
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import NOISE_OF_TWO
from tests.helpers.models import lm, prompt
from tests.helpers.speed_runs import run_of_results

LENGTH, SHORTER = 24, (7, 15)
PROMPTS = {"set/a/0": list(prompt()), "set/b/0": list(prompt(9)), "set/b/1": list(prompt(13))}
ARMS = {
    "ar": {},
    "lookup": {"drafter": "lookup", "ngram": 1},
    "ar-16": {"policy": "sink-window", "cache": 16},
    "lookup-16": {"drafter": "lookup", "ngram": 1, "policy": "sink-window", "cache": 16},
    "hf-generate": {"peer": "generate"},
}


@cache
def results() -> Results:
    arms = [make_arm(name, entry, lm("llama"), None, "eager", SHORTER) for name, entry in ARMS.items()]
    return experiment(arms, PROMPTS, LENGTH)


def kept(results: Results) -> RunFile:
    return run_of_results(results, LENGTH)


# Shorter lengths.


@pytest.mark.parametrize("count", [1, 2, 5, 11, 23, 24])
def test_a_generation_cut_is_the_shorter_generation(count: int) -> None:
    """Guards against a shorter length with the numbers of a longer run. Its tokens, steps, evictions and bytes must
    equal those of a run that stops there. Only the last steps may have drafted past the end.
    """
    depth, policy = 3, SinkWindow(16)
    rules = {"drafter": PromptLookup(max_ngram=1), "controller": FixedK(depth)}
    whole = generate(lm("llama"), prompt(), policy=policy, max_new_tokens=LENGTH, **rules)
    short = generate(lm("llama"), prompt(), policy=policy, max_new_tokens=count, **rules)
    cut = whole.until(count)
    assert cut.tokens == short.tokens
    assert cut.finish_reason == "length"
    assert [step.emitted for step in cut.steps] == [step.emitted for step in short.steps]
    assert cut.prefill_s == whole.prefill_s
    for name in ("prompt_tokens", "prefill_forwards", "target_forwards"):
        assert getattr(cut, name) == getattr(short, name)
    # A step drafts less only where fewer tokens are left than a whole draft has.
    ends = accumulate(step.emitted for step in short.steps)
    early = sum(end <= count - depth - 1 for end in ends)
    assert count < 11 or early > 2
    both = [dataclasses.replace(of, steps=of.steps[:early]) for of in (cut, short)]
    for name in ("drafted", "accepted", "compressions", "cache_bytes", "peak_cache_bytes", "attended_bytes"):
        assert len({getattr(of, name) for of in both}) == 1, name


def test_a_cut_takes_the_time_of_its_steps() -> None:
    """Guards against a short text that is charged for later steps, or for no time at all."""
    whole = generate(lm("llama"), prompt(), max_new_tokens=LENGTH)
    times = [whole.until(count).total_s for count in range(1, LENGTH + 1)]
    assert times == sorted(times)
    assert times[-1] == whole.total_s
    assert times[9] - times[4] == pytest.approx(sum(step.total_s for step in whole.steps[5:10]))
    for count in (0, LENGTH + 1):
        with pytest.raises(ValueError, match=f"{count} tokens were asked for"):
            whole.until(count)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_looked_at_where_it_was_asked(arm: str) -> None:
    """Guards against an arm, or a peer, without the shorter lengths or with another arm's."""
    for block in results().blocks:
        run = block.runs[arm]
        assert [len(cut.tokens) for cut in run.cuts] == list(SHORTER)
        first, second = run.cuts
        assert run.tokens[: SHORTER[1]] == second.tokens
        assert 0 < first.total_s < second.total_s < run.total_s
        assert first.counts.steps <= second.counts.steps <= run.counts.steps
        assert first.ttft_s == run.ttft_s


def test_a_peers_time_at_a_length_is_that_of_its_tokens() -> None:
    """Guards against the streamer's first call, which is the prompt, counted as a token."""
    run = make_arm("hf", {"peer": "generate"}, lm("llama"), None, "eager", [1, 2]).run(list(prompt()), LENGTH, ())
    assert [cut.counts.steps for cut in run.cuts] == [1, 2]
    assert run.cuts[0].total_s == run.ttft_s


def test_lengths_survive_the_file_and_the_journal(tmp_path: Path) -> None:
    """Guards against a resumed run, or a report from the file, that has only the full length."""
    file = tmp_path / "blocks.jsonl"
    journal = Journal(file, {"what": 1}, resume=False)
    for block in results().blocks:
        journal.add_block(block, {})
    assert Journal(file, {"what": 1}, resume=True).blocks() == results().blocks

    run = kept(results())
    assert run.lengths == [*SHORTER, LENGTH]
    assert run.at(LENGTH) is run
    for length in SHORTER:
        short = run.at(length)
        assert short.header.max_new_tokens == length
        for arm, record in short.arms.items():
            assert set(record.rows) == set(PROMPTS)
            assert record.counts().tokens == length * len(PROMPTS)
            for prompt_, row in record.rows.items():
                blocks = [block.at(length) for block in results().blocks if block.prompt == prompt_]
                assert [row.log_speedup] == [block.log_s("ar") - block.log_s(arm) for block in blocks]
    assert run.arms["lookup"].options == ARMS["lookup"]


def test_speedups_at_a_length_are_paired_there() -> None:
    """Guards against a speedup of a short text over the baseline's time for the full length."""

    def run(seconds: Sequence[float]) -> Run:
        short = Run([1, 2], seconds[0], 0.1, Counts(steps=2))
        return Run([1, 2, 3, 4], seconds[1], 0.1, Counts(steps=4), cuts=[short])

    block = Block(
        "p",
        0,
        {"ar": run((1.0, 8.0)), "arm": run((0.5, 2.0))},
        {"ar": run((4.0, 2.0))},
        {"ar": "equal", "arm": "equal"},
    )
    assert block.log_s("ar") - block.log_s("arm") == pytest.approx(math.log(2))
    short = block.at(2)
    assert short.log_s("ar") - short.log_s("arm") == pytest.approx(math.log(4))
    assert block.at(3).runs == {}


def test_outputs_of_two_lengths_are_compared_by_the_token() -> None:
    """Guards against an arm called fast because a stop token ended its text early."""
    runs = {"ar": Run([1, 2, 3, 4], 4.0, 1.0, Counts(steps=4)), "arm": Run([1, 2], 2.0, 1.0, Counts(steps=2))}
    block = Block("p", 0, runs, {"ar": runs["ar"]}, {"ar": "equal", "arm": "equal"})
    assert block.log_s("ar") - block.log_s("arm") == pytest.approx(0.0)


# Tasks.


def test_a_task_is_told_by_its_own_prompts() -> None:
    """Guards against a task's rows with another task's times, and against a noise floor over more prompts than the task
    has.
    """
    run = kept(results())
    assert run.tasks == {"set/a": ["set/a/0"], "set/b": ["set/b/0", "set/b/1"]}
    part = run.with_prompts(run.tasks["set/b"])
    assert list(part.header.outputs) == run.tasks["set/b"]
    for arm, record in part.arms.items():
        assert record.rows == {prompt_: run.arms[arm].rows[prompt_] for prompt_ in run.tasks["set/b"]}
        assert set(part.at(SHORTER[0]).arms[arm].rows) == set(run.tasks["set/b"])
    one = run.with_prompts(["set/a/0"])
    noise = results().blocks[0]
    ratio = NOISE_OF_TWO * abs(math.log(noise.runs["ar"].total_s / noise.last["ar"].total_s))
    assert one.header.floor == pytest.approx(max(ratio, run.header.floor))
    assert one.speedup("lookup").high / one.speedup("lookup").low == pytest.approx(math.exp(2 * one.header.floor))


def test_the_report_has_a_row_for_each_part() -> None:
    """Guards against a report that shows only the mean of a whole grid."""
    run = kept(results())
    rows = by_part(run).rows
    assert len(rows) == 2 * 3 * len(ARMS)
    assert [row[:4] for row in rows[:2]] == [["set/a", "1", "7", "ar"], ["set/a", "1", "7", "lookup"]]
    page = markdown(run, "title", "", [], _no_history())
    assert "set/b" in page
    assert "evictions" in page
    whole = kept(results()).with_prompts(["set/a/0"])
    arms = {arm: dataclasses.replace(record, shorter={}) for arm, record in whole.arms.items()}
    assert by_part(dataclasses.replace(whole, arms=arms)).rows == []


def _no_history():  # type: ignore[no-untyped-def]
    from specdecode.bench.gate.history import History

    return History([], "none")


# Output statistics.


def test_repetition_is_the_share_of_4_grams_that_came_before() -> None:
    """Guards against a fast result that is only a loop, without a sign of it."""
    assert repeated(range(10)) == (0, 7)
    assert repeated([1, 2, 3, 1, 2, 3, 1, 2]) == (2, 5)
    assert repeated([5] * 8) == (4, 5)
    assert repeated([1, 2, 3]) == (0, 0)


def test_own_losses_are_those_of_one_forward() -> None:
    """Guards against a loss of the neighbouring token, and against one computed without the prompt."""
    target = lm("llama")
    for text in (list(prompt()), list(prompt())[:1]):
        tokens = generate(target, text, max_new_tokens=200).tokens
        ids = torch.tensor([[*text, *tokens]])
        with torch.inference_mode():
            logits = target.model(ids).logits[0, len(text) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(text) :], reduction="none")
        losses = own_losses(target, text, tokens)
        assert losses is not None
        assert torch.allclose(losses, expected, atol=1e-5)
    assert own_losses(target, list(prompt()), [1] * target.context_length) is None


def test_cuts_are_told_of_their_own_tokens() -> None:
    """Guards against a shorter length with the perplexity or repetition of the full length."""
    cut = Run([5, 5, 5, 5, 5], 1.0, 0.1, Counts(steps=5))
    run = with_output_stats(Run([5] * 5 + [1, 2, 3], 2.0, 0.1, Counts(steps=8), cuts=[cut]), torch.arange(8.0))
    assert run.counts == Counts(steps=8, ngrams=5, repeated=1, nll=28.0)
    assert run.cuts[0].counts == Counts(steps=5, ngrams=2, repeated=1, nll=10.0)
    assert with_output_stats(cut, None).counts.nll is None


def test_outputs_of_several_prompts_are_told_apart() -> None:
    """Guards against two equal outputs counted as a loop."""
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    two = Run(tokens, 1.0, 0.1, Counts(steps=12), latencies=Latencies(ttft=[0.1, 0.1]))
    assert two.outputs == [tokens[:6], tokens[6:]]
    counts = with_output_stats(two, torch.arange(12.0)).counts
    assert (counts.repeated, counts.ngrams, counts.nll) == (0, 6, None)
    assert with_output_stats(Run(tokens, 1.0, 0.1, Counts(steps=12)), None).counts.repeated == 3


def test_looping_text_is_flagged() -> None:
    """Guards against a table in which a loop looks like a result."""
    run = kept(results())
    record = run.arms["lookup"]
    for repeats, flagged in ((0.49, False), (0.5, True)):
        rows = {
            name: dataclasses.replace(row, counts=dataclasses.replace(row.counts, ngrams=100, repeated=100 * repeats))
            for name, row in record.rows.items()
        }
        looping = dataclasses.replace(run, arms=run.arms | {"lookup": dataclasses.replace(record, rows=rows)})
        assert outputs(looping, "lookup") == ("equal loops" if flagged else "equal")


# Stop tokens.


def test_stop_tokens_end_every_arm_where_they_end_the_baseline() -> None:
    """Guards against arms, peers or references that continue past the stop token of the others."""
    target = lm("llama")
    stop = generate(target, prompt(), max_new_tokens=LENGTH).tokens[9]
    arms = [make_arm(name, entry, target, None, "eager", SHORTER, [stop]) for name, entry in ARMS.items()]
    done = experiment(arms, {"a/0": list(prompt())}, LENGTH)
    (block,) = done.blocks
    assert set(block.checks.values()) == {"equal"}
    ends = {arm: len(run.tokens) for arm, run in block.runs.items()}
    assert ends["ar"] == ends["lookup"] == ends["hf-generate"] <= 10
    assert block.runs["ar"].tokens[-1] == stop
    assert ends["ar-16"] == ends["lookup-16"]
    # The text stopped before the second length.
    assert [len(cut.tokens) for cut in block.runs["ar"].cuts] == [length for length in SHORTER if length < ends["ar"]]


def test_arms_that_must_write_the_same_share_one_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a reference decoded for each of a sweep's arms, which takes longer than the sweep."""
    caches = {"a": 16, "b": 16, "c": 32}
    entries = {"ar": {}} | {name: {"policy": "sink-window", "cache": cache_} for name, cache_ in caches.items()}
    arms = [make_arm(name, entry, lm("llama"), None, "eager") for name, entry in entries.items()]
    decoded: list[str] = []
    expected = Arm.expected
    monkeypatch.setattr(Arm, "expected", lambda arm, *of: decoded.append(arm.name) or expected(arm, *of))
    block = measure_block(arms, "p", prompt(), LENGTH)
    assert set(block.checks.values()) == {"equal"}
    assert decoded == ["a", "c"]


# Rehearsals.


@pytest.mark.parametrize("name", ["quick", "full", "comprehensive", "long-sequence", "sweep", "int8", "streaming"])
def test_a_rehearsal_has_the_arms_and_the_grid_of_its_preset(name: str) -> None:
    """Guards against a rehearsal without the part at which the long run will fail."""
    whole, tiny = preset(name), preset(name).tiny()
    assert tiny.arms.keys() == whole.arms.keys()
    assert len(set(tiny.lengths)) == len(whole.lengths)
    assert tiny.max_new_tokens <= 40
    assert len(tiny.prompts.split(",")) == len(whole.prompts.split(","))
    for arm, entry in whole.arms.items():
        assert tiny.arms[arm].keys() == entry.keys()
        assert tiny.arms[arm].get("cache", 0) == entry.get("cache", 0) // 8


def test_generations_without_steps_have_no_cache() -> None:
    """Guards against a measure that raises for a generation without steps."""
    nothing = Generation()
    assert (nothing.cache_bytes, nothing.peak_cache_bytes, nothing.attended_bytes, nothing.compressions) == (0, 0, 0, 0)
