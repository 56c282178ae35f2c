"""Medusa heads: their proposals, and their files."""

from __future__ import annotations

from fnmatch import fnmatch
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from specdecode import (
    BestFirstTree,
    Chain,
    FixedK,
    MedusaDrafter,
    Sampling,
    StaticTree,
    UnsupportedModelError,
    generate,
    load_medusa,
)
from specdecode.bench.arms.arm import make_arm
from specdecode.controllers.base import Limit
from specdecode.core.errors import ModelFileError
from specdecode.core.sampling import Rng
from specdecode.drafters.base import Context
from specdecode.drafters.medusa import MedusaHeads
from specdecode.models.recording import recorded_hidden_states
from tests.helpers.heads import MEDUSA_BLOCKS, MEDUSA_HEADS, write_medusa
from tests.helpers.models import VOCABULARY, greedy, lm, prompt
from tests.helpers.trees import paths


def by_hand(tensors: dict[str, Tensor], text: list[int]) -> list[Tensor]:
    """Return the logits of each head at the token before the last."""
    target = lm("llama")
    with torch.inference_mode():
        told = target.model(torch.tensor([text], device=target.device), output_hidden_states=True)
    state = told.hidden_states[-1][0, -2].cpu()  # transformers has normalised the last states
    logits = []
    for head in range(MEDUSA_HEADS):
        x = state
        for block in range(MEDUSA_BLOCKS):
            name = f"{head}.{block}.linear"
            x = x + silu(tensors[f"{name}.weight"].double() @ x + tensors[f"{name}.bias"].double())
        logits.append(tensors[f"{head}.{MEDUSA_BLOCKS}.weight"].double() @ x)
    return logits


def context(text: list[int], sampling: Sampling = Sampling()) -> Context:
    target = lm("llama")
    with recorded_hidden_states(target.model, [3]) as states, torch.inference_mode():
        target.model(torch.tensor([text], device=target.device), use_cache=False)
    return Context(text, VOCABULARY, sampling, Rng(0), states[0][0, :-1])


@pytest.mark.parametrize(
    ("prefix", "name"), [("", "medusa_lm_head.safetensors"), ("medusa_head.", "medusa_lm_head.pt")], ids=["safe", "pt"]
)
def test_each_head_proposes_its_own_depth(prefix: str, name: str, tmp_path: Path) -> None:
    """Guards against a head that is read one token off, a state before the final norm, and a tree that mixes up the
    heads' tokens.
    """
    logits = by_hand(write_medusa(tmp_path, prefix=prefix, name=name), [*prompt(11)])
    heads = load_medusa(str(tmp_path), lm("llama"))
    tree = MedusaDrafter(heads).propose(context([*prompt(11)]), Limit(5))
    assert tree.tokens.tolist() == [int(each.argmax()) for each in logits]
    assert len({*tree.tokens.tolist()}) > 1
    tree = MedusaDrafter(heads, StaticTree((2, 1))).propose(context([*prompt(11)]), Limit(5))
    second = int(logits[1].argmax())
    assert tree.tokens.tolist() == [*logits[0].topk(2).indices.tolist(), second, second]
    probs = [each.softmax(-1).tolist() for each in logits]
    expected = [path for depth in (1, 2) for path in product(range(VOCABULARY), repeat=depth)]
    expected.sort(key=lambda path: -prod(probs[at][token] for at, token in enumerate(path)))
    tree = MedusaDrafter(heads, BestFirstTree(nodes=4, threshold=0.0)).propose(context([*prompt(11)]), Limit(2))
    found = [tuple(path) for path in paths(tree)]
    assert sorted(found) == sorted(expected[:4])
    assert {len(path) for path in found} == {1, 2}


def test_a_sampled_chain_carries_what_it_was_drawn_from(tmp_path: Path) -> None:
    """Guards against the distribution of another depth, with which sampling is inexact."""
    logits, sampling = by_hand(write_medusa(tmp_path), [*prompt(11)]), Sampling(3.0, top_k=20)
    tree = MedusaDrafter(load_medusa(str(tmp_path), lm("llama"))).propose(context([*prompt(11)], sampling), Limit(3))
    assert tree.probs is not None
    torch.testing.assert_close(tree.probs.cpu(), torch.stack([sampling.probs(each[None])[0] for each in logits]))


def test_drafts_change_no_token(tmp_path: Path) -> None:
    """Guards against draft tokens accepted without verification, and heads that change the target."""
    write_medusa(tmp_path)
    target = lm("llama")
    trained = [weight.requires_grad for weight in target.model.parameters()]
    heads = load_medusa(str(tmp_path), target)
    for shape in (Chain(), StaticTree((3, 2)), BestFirstTree(nodes=6, threshold=0.0)):
        drafter = MedusaDrafter(heads, shape)
        result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=30)
        assert result.tokens == greedy("llama", 30)
        assert result.drafted > len(result.steps)
    assert [weight.requires_grad for weight in target.model.parameters()] == trained


def test_an_arm_drafts_with_them(tmp_path: Path) -> None:
    """Guards against an arm's entry that does not reach the heads, and one that names no heads."""
    write_medusa(tmp_path)
    entry: dict[str, Any] = {"drafter": "medusa", "head": str(tmp_path), "shape": "static", "branching": [2, 2]}
    made = make_arm("arm", entry, lm("llama"), None, "eager").run(prompt(), 20, ())
    assert made.tokens == greedy("llama", 20)
    assert made.histograms.depth[2] > 5
    with pytest.raises(ValueError, match="drafter 'medusa' needs heads: name their folder with head"):
        make_arm("arm", {"drafter": "medusa"}, lm("llama"), None, "eager")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda f: (f / "config.json").write_text("{}"),
            "holds no Medusa heads: its config.json has no 'medusa_num_heads'",
        ),
        (lambda f: (f / "medusa_lm_head.safetensors").unlink(), "it holds no weights"),
        (lambda f: (f / "medusa_lm_head.safetensors").write_bytes(b"half"), "cannot read the Medusa heads"),
        (
            lambda f: save_file(
                {k: v for k, v in load_file(f / "medusa_lm_head.safetensors").items() if k != "1.0.linear.bias"},
                f / "medusa_lm_head.safetensors",
            ),
            r"do not fit llama: blocks\.1\.0\.bias is None, not \(32,\)",
        ),
    ],
)
def test_damaged_heads_are_one_sentence(damage: Any, sentence: str, tmp_path: Path) -> None:
    """Guards against a traceback, and heads that draft with half of their weights."""
    write_medusa(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelFileError, match=sentence):
        load_medusa(str(tmp_path), lm("llama"))
    with pytest.raises(ModelFileError, match="there is no draft head 'nowhere': name a folder with Medusa heads"):
        load_medusa("nowhere", lm("llama"))


def test_original_heads_are_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download without the weights, and pickle's traceback for a damaged file."""
    write_medusa(tmp_path)
    stored = tmp_path / "medusa_lm_head.safetensors"
    torch.save(load_file(stored), tmp_path / "medusa_lm_head.pt")
    stored.unlink()

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert any(fnmatch("medusa_lm_head.pt", pattern) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("specdecode.heads.loading.snapshot_download", fetch)
    assert len(load_medusa("somebody/medusa", lm("llama")).outputs) > 1
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"half")
    with pytest.raises(ModelFileError, match="cannot read the Medusa heads"):
        load_medusa("somebody/medusa", lm("llama"))


def test_a_target_without_a_final_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against heads that read other states than they were trained on."""
    monkeypatch.setattr("specdecode.drafters.medusa.final_norm", lambda model: None)
    with pytest.raises(UnsupportedModelError, match="llama has no final norm that can be found"):
        MedusaHeads(lm("llama"), 1, 1)
