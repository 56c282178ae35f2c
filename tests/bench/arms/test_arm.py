"""Arms built from a preset's entries, and the result of one run of each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specdecode import TokenizerMismatchError, generate
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.run import Run
from specdecode.bench.measure import speed_session
from specdecode.bench.measure.experiment import row_of
from specdecode.bench.options import Options
from specdecode.bench.plan import resolve
from specdecode.bench.quality import quality_session
from specdecode.bench.quality.plan import resolve_quality
from specdecode.bench.runs.records import ArmRecord
from tests.helpers.models import VOCABULARY, greedy, lm, prompt, small
from tests.helpers.spelling import CHARACTERS, characters

LENGTH = 20


def test_a_draft_of_another_vocabulary_serves_the_arm_that_goes_by_text() -> None:
    """Guards against a pair of different vocabularies that cannot be measured at all, and against arms that read the
    draft's token ids as the target's.
    """
    target, draft = lm("llama"), small(vocab_size=VOCABULARY)
    draft.tokenizer = characters(CHARACTERS[::-1])
    run = make_arm("by-text", {"drafter": "universal", "k": 3}, target, draft).run(prompt(), LENGTH, ())
    assert run.tokens == greedy("llama", LENGTH)
    assert run.counts.draft_forwards > 0
    assert len(run.histograms.depth) == 4
    for options in ({"drafter": "model"}, {"peer": "assisted"}):
        with pytest.raises(TokenizerMismatchError, match="does not share the vocabulary of llama"):
            make_arm("arm", options, target, draft)
    draft.tokenizer = None
    with pytest.raises(TokenizerMismatchError, match="small has no tokenizer"):
        make_arm("arm", {"drafter": "universal"}, target, draft)


def test_a_batch_shares_forwards_and_tells_a_prompts_share_of_the_time() -> None:
    """Guards against a batch that decodes its copies one by one, and against a batch time that is divided in one place
    and not in another.
    """
    target = lm("llama")
    arm = make_arm("batch", {"drafter": "lookup", "batch": 4}, target, None)
    shapes: list[torch.Size] = []
    started = time.perf_counter()
    with target.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    ):
        run = arm.run(prompt(), 30, ())
    elapsed = time.perf_counter() - started
    assert run.tokens == generate(target, prompt(), max_new_tokens=30).tokens
    assert sorted(shape[1] for shape in shapes if shape[0] == 1)[-1] == len(prompt()) - 1
    assert next(shape[0] for shape in shapes if shape[0] > 1) == 4
    assert 0 < 4 * run.total_s <= elapsed
    assert run.seconds.verify < run.total_s


def test_a_replayed_draft_costs_what_a_real_one_does() -> None:
    """Guards against a synthetic arm that skips the draft's forwards, or accepts at another rate than the set one."""
    target = lm("llama")
    draft = target.subset([0])
    options = {"drafter": "model", "k": 4, "replay": 0.8}
    arm = make_arm("replayed", options, target, draft)
    expected = generate(target, prompt(), max_new_tokens=200).tokens
    run = arm.run(prompt(), 200, expected)
    assert arm.synthetic
    assert run.counts.draft_forwards == sum(depth * steps for depth, steps in enumerate(run.histograms.depth))
    record = ArmRecord({"p": row_of([0.0], [run], [run])})
    assert 0.6 < record.acceptance_by_position()[0] < 0.95
    assert run.counts.lost == 0
    # Texts of equal length are not right at the same places.
    texts = [tuple((token + shift) % VOCABULARY for token in prompt()) for shift in range(4)]
    outputs = [generate(target, text, max_new_tokens=200).tokens for text in texts]
    assert len({arm.run(*given).counts.steps for given in zip(texts, [200] * 4, outputs, strict=True)}) > 1
    # The target leaves this text at the tenth token. Tokens that occur nowhere else follow.
    wrong = [*expected[:10], *range(VOCABULARY)]
    lost = arm.run(prompt(), 200, wrong).counts
    assert 0.5 * lost.steps < lost.lost < lost.steps
    assert Run.from_json(run.as_json()).counts == run.counts


@pytest.mark.parametrize(("entry", "steps"), [({"k": 4}, 8), ({}, 7)], ids=str)
def test_peers_draft_as_long_as_they_are_told(entry: dict[str, int], steps: int) -> None:
    """Guards against transformers drafting with another K than the arm's. All drafts are right here, so the number of
    steps shows K. Ours has one step more: its first token comes without a draft.
    """
    target = lm("llama")
    arm = make_arm("hf-assisted", {"peer": "assisted", **entry}, target, target)
    ours = make_arm("linear", {"drafter": "model", **entry}, target, target)
    peer_run, own_run = arm.run(prompt(), 40, ()), ours.run(prompt(), 40, ())
    assert peer_run.tokens == own_run.tokens
    assert peer_run.counts.steps == steps
    assert own_run.counts.steps == steps + 1


def test_peers_draft_by_another_vocabulary_and_by_few_layers() -> None:
    """Guards against a peer that decodes without its draft, and one that leaves its settings behind in the target."""
    target, draft = lm("llama"), small(vocab_size=VOCABULARY - 8)
    target.tokenizer, draft.tokenizer = characters(CHARACTERS), characters(CHARACTERS[::-1][8:])
    read: list[int] = []
    draft.model.register_forward_pre_hook(lambda *given: read.append(1))

    def steps(entry: dict[str, Any]) -> float:
        run = make_arm("drafting", entry, target, draft).run(prompt(), LENGTH, ())
        assert run.tokens == greedy("llama", LENGTH)
        return run.counts.steps

    assert steps({"peer": "universal", "k": 3}) <= LENGTH < len(read)
    assert steps({"peer": "early-exit", "early_exit": 3, "k": 3}) < LENGTH
    assert steps({"peer": "generate"}) == LENGTH
    for entry, reason in (
        ({"peer": "universal"}, "needs a draft of another vocabulary size"),
        ({"peer": "early-exit", "early_exit": 4}, "the target has 4 layers, and fewer draft"),
    ):
        with pytest.raises(ValueError, match=f"arm 'it': .*{reason}"):
            make_arm("it", entry, target, target)
    # Its forward ends in an error if its configuration names fewer layers, which would then stay there.
    other = lm("gpt-neox")
    layers = other.config.num_hidden_layers
    with pytest.raises(ValueError, match="first layers of a GPTNeoXForCausalLM, which always runs all"):
        make_arm("it", {"peer": "early-exit", "early_exit": 2}, other, None)
    assert other.config.num_hidden_layers == layers


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drafter": "oracle"}, "no drafter is named 'oracle'"),
        ({"peer": "magic"}, "no peer is named 'magic'"),
        ({"peer": "early-exit"}, "needs early_exit: the number of layers that draft"),
        ({"peer": "assisted", "early_exit": 2}, "unknown options: early_exit"),
        ({"drafter": "lookup", "speed": 9}, "unknown options: speed"),
        ({"drafter": "model", "shape": "ring"}, "no tree shape is named 'ring'"),
        ({"drafter": "model", "k": 0}, "K is 0"),
        ({"drafter": "lookup", "ngram": 0}, "max_ngram is 0"),
        ({"drafter": "lookup+model", "min_ngram": 4}, "min_ngram is 4"),
        ({"drafter": "lookup+oracle"}, "no drafter is named 'oracle'"),
        ({"policy": "amnesia"}, "no cache policy is named 'amnesia': choose from heavy-hitter, key-norm, random"),
        ({"policy": "sink-window", "cache": 3}, "cache is 3: .*; choose a larger cache$"),
        ({"peer": "generate", "policy": "random"}, "accepts no policy"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2, "drafter": "model", "replay": 0.5}, "batch is 2: it is 1 or more, and 1 for replayed drafts"),
        ({"quantize": "int2"}, "quantize is 'int2'"),
        ({"drafter": "lookup", "controller": "magic"}, "no controller is named 'magic': choose from fixed, adaptive"),
        ({"drafter": "lookup", "controller": "adaptive", "k": 3}, "k is of no use with the controller 'adaptive'"),
        ({"drafter": "lookup", "controller": "cost-aware", "k": 3}, "k is of no use with the controller 'cost-aware'"),
        ({"peer": "generate", "controller": "adaptive"}, "unknown options: controller"),
    ],
)
def test_a_wrong_entry_of_a_preset_is_named(options: dict[str, object], reason: str) -> None:
    """Guards against a typing error that silently measures another configuration."""
    with pytest.raises(ValueError, match=f"^arm 'arm': .*{reason}"):
        make_arm("arm", options, lm("llama"), lm("llama"))


def test_a_wrong_entry_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    """Guards against minutes of loading before a typing error is reported."""
    folder = str(tmp_path / "nowhere")
    speed = tmp_path / "speed.toml"
    speed.write_text(
        'prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 1\n[arms]\nar = {}\nit = { drafter = "mode" }\n'
    )
    with pytest.raises(ValueError, match=r"^arm 'it': no drafter is named 'mode'"):
        speed_session.measure(resolve(Options(root=tmp_path, preset=str(speed), target=folder)), {"it"})
    quality = tmp_path / "quality.toml"
    quality.write_text('texts = "prose@48:3"\nk = 3\n[arms]\nit = { policy = "sink-window", cache = 3 }\n')
    with pytest.raises(ValueError, match=r"^arm 'it': cache is 3"):
        quality_session.measure(resolve_quality(Options(root=tmp_path, preset=str(quality), target=folder)), {"it"})


def test_an_arm_that_drafts_needs_a_draft_model() -> None:
    """Guards against an arm without its draft model that fails in the middle of the experiment."""
    drafting = [{"drafter": drafter} for drafter in ("model", "lookup+model", "universal")]
    for options in (*drafting, {"peer": "assisted"}, {"peer": "universal"}):
        with pytest.raises(ValueError, match="--draft"):
            make_arm("arm", options, lm("llama"), None)
