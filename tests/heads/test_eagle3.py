"""EAGLE-3 heads of every wiring: their proposals, and their files."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdecode import (
    LM,
    BestFirstTree,
    Chain,
    FixedK,
    HeadDrafter,
    Sampling,
    SinkWindow,
    StaticTree,
    UnsupportedModelError,
    generate,
    generate_batch,
    load_head,
)
from specdecode.controllers.base import Limit
from specdecode.core.errors import ModelFileError
from specdecode.core.sampling import Rng
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.heads.bound import BoundHead, head_shape, output_rows
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import describe, make_eagle3, read_eagle3, write_eagle3
from specdecode.heads.fingerprint import target_fingerprint
from specdecode.models.embedded import EMBEDDED
from specdecode.models.forwards import ForwardInput
from specdecode.models.recording import recorded_hidden_states
from tests.helpers import models
from tests.helpers.heads import write_head
from tests.helpers.models import ARCHITECTURES, build, greedy, lm, moved, prompt
from tests.helpers.trees import paths

LENGTH = 30
SHAPES = (Chain(), StaticTree((3, 2, 1)), BestFirstTree(nodes=10, threshold=0.001))


@dataclass(frozen=True)
class Variant:
    """A head of random weights, some of which are the target's own, so that it is sometimes right."""

    layers: tuple[int, ...] = (0, 1, 3)
    target: str = "llama"
    decoder: dict[str, Any] = field(default_factory=dict)
    proposed: int = 60
    wiring: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changes = {**self.decoder, **self.wiring}
        return f"{self.target}-{','.join(map(str, self.layers))}-{'-'.join(map(str, changes)) or 'plain'}"

    def head(self) -> Eagle3Head:
        return _head(
            str(self), self.layers, self.target, tuple(self.decoder.items()), self.proposed, tuple(self.wiring.items())
        )


@functools.cache
def _head(name: str, layers: tuple[int, ...], target: str, decoder: Any, proposed: int, wiring: Any) -> Eagle3Head:
    model = lm(target)
    shape = head_shape(model, layers)
    values = {**shape.decoder.to_dict(), **dict(decoder)}
    kind = type(shape.decoder)
    if "kind" in values:
        kind = {
            "llama": type(head_shape(lm("llama"), (0,)).decoder),
            "qwen3": type(head_shape(lm("qwen3"), (0,)).decoder),
        }[values.pop("kind")]
    shape = replace(shape, decoder=kind(**values), **({"fc_norm": False} | dict(wiring)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokens = torch.randperm(model.vocab_size)[:proposed]
        head = Eagle3Head(shape, tokens).double()
        with torch.no_grad():
            for part, weight in head.named_parameters():
                if "norm" in part:
                    weight.uniform_(0.5, 2.0)
                elif weight.dim() > 1:
                    weight.normal_(0.0, 0.3)
            if head.lm_head is not None:
                head.lm_head.weight.normal_(0.0, 2.0)
    return head


VARIANTS = [
    Variant(),
    Variant(wiring={"norm_before_residual": True, "norm_output": True, "own_output": False}),
    Variant(wiring={"norm_before_fc": True, "own_embeddings": True}, layers=(3, 1), target="gpt-neox"),
    Variant(wiring={"fc_norm": True, "norm_output": True}, decoder={"num_hidden_layers": 2}, layers=(-1, 2)),
    Variant(
        decoder={"kind": "qwen3", "num_hidden_layers": 2},
        layers=(2,),
        proposed=97,
        wiring={"norm_before_residual": True},
    ),
    Variant(decoder={"attention_bias": True, "mlp_bias": True}, target="gemma3-window", wiring={"own_output": False}),
]


def hidden_states(target: LM, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """Return the hidden states by transformers. [n, F]

    Its first ones are the embeddings, and its last ones are after the final norm.
    """
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.inference_mode(), recorded_hidden_states(target.model, layers) as recorded:
        output = target.model(ids, use_cache=False, output_hidden_states=True)
    for layer, states in zip(layers, recorded, strict=True):
        if layer < len(output.hidden_states) - 2:
            torch.testing.assert_close(states, output.hidden_states[layer + 1])
    return torch.cat(list(recorded), -1)[0]


@torch.inference_mode()
def from_scratch(variant: Variant, text: Sequence[int], path: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the distribution behind a text and a path of proposals, without slots: each token reads everything again.
    [V]
    """
    head, target = variant.head(), lm(variant.target)
    embedding = head.embed_tokens or target.model.get_input_embeddings()
    states = head.fused(hidden_states(target, text, variant.layers)[:-1].cpu())
    for read in range(len(path) + 1):
        so_far = [*text, *path[:read]]
        count = len(so_far) - 1
        embedded = embedding(torch.tensor(so_far[1:], device=embedding.weight.device)).cpu()
        own = head(
            embedded[None],
            states[None],
            torch.arange(1, count + 1),
            lambda keys, values, layer: (keys, values),
            torch.ones(count, count).tril().bool(),
        )[0]
        states = torch.cat([states, own[-1:]])
    rows = output_rows(target, head.tokens).cpu() if head.lm_head is None else head.lm_head.weight
    logits = torch.full((target.vocab_size,), -torch.inf, dtype=torch.float64)
    logits[head.tokens] = head.logits(own[-1:], rows)[0]
    return sampling.probs(logits)


def proposed(variant: Variant, text: Sequence[int], shape: TreeShape, sampling: Sampling, depth: int) -> DraftTree:
    """Return the proposal of a drafter that has already read a beginning of the text."""
    target = lm(variant.target)
    drafter = HeadDrafter(BoundHead(variant.head(), target), shape)
    for length in (6, len(text)):
        states = hidden_states(target, text[:length], variant.layers)[:-1]
        tree = drafter.propose(Context(text[:length], target.vocab_size, sampling, Rng(0), states), Limit(depth))
    return tree


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_chain_and_a_tree_are_the_head_s_own(variant: Variant) -> None:
    """Guards against a wiring that differs between drafting and a forward from scratch: a layer that writes into
    another's slots, a state that is normalised once too often, or ids of the head read as the target's.
    """
    text, greedily = [*prompt(11)], Sampling()
    chain: list[int] = []
    for _ in range(4):
        chain.append(int(from_scratch(variant, text, chain, greedily).argmax()))
    assert paths(proposed(variant, text, Chain(), greedily, 4))[-1] == chain
    sampling = Sampling(1.5, top_k=9)
    tree = proposed(variant, text, StaticTree((2, 2)), sampling, 2)
    assert tree.probs is not None
    assert len(tree) == 6
    for path, distribution, parent, node in zip(paths(tree), tree.probs, tree.parents.tolist(), range(6), strict=True):
        earlier = [int(tree.tokens[i]) for i in range(node) if tree.parents[i] == parent]
        expected = from_scratch(variant, text, path[:-1], sampling).index_fill(0, torch.tensor(earlier).long(), 0.0)
        torch.testing.assert_close(distribution.cpu(), expected / expected.sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_its_drafts_change_no_token(variant: Variant) -> None:
    """Guards against draft tokens that are accepted without verification."""
    target = lm(variant.target)
    head, plain = BoundHead(variant.head(), target), greedy(variant.target, LENGTH)
    for shape in SHAPES:
        result = generate(
            target, prompt(), drafter=HeadDrafter(head, shape), controller=FixedK(3), max_new_tokens=LENGTH
        )
        assert result.tokens == plain
        assert result.drafted > len(result.steps)
    prompts = [list(prompt(14)), list(prompt(9))]
    batch = generate_batch(target, prompts, batch_size=2, drafter=lambda: HeadDrafter(head), max_new_tokens=LENGTH)
    assert [result.tokens for result in batch] == [
        generate(target, text, max_new_tokens=LENGTH).tokens for text in prompts
    ]
    if variant.target == "llama":
        window = SinkWindow(15, sinks=2, trigger=0.5, interval=8)
        expected = generate(target, prompt(), policy=window, max_new_tokens=LENGTH)
        result = generate(target, prompt(), drafter=HeadDrafter(head), policy=window, max_new_tokens=LENGTH)
        assert result.tokens == expected.tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_written_head_comes_back(variant: Variant, tmp_path: Path) -> None:
    """Guards against a flag, a size or a tensor that is lost in the file."""
    head, target = variant.head(), lm(variant.target)
    fingerprint = target_fingerprint(target)
    write_eagle3(tmp_path, head, None, fingerprint, ["Model"], {"seed": 3}, "# A head\n")
    files = read_eagle3(tmp_path)
    again = make_eagle3(files, fingerprint.layers, 32)
    assert describe(again.shape) == describe(head.shape)
    assert again.shape.own_output == head.shape.own_output
    assert again.shape.own_embeddings == head.shape.own_embeddings
    assert torch.equal(again.tokens, head.tokens)
    stored = again.state_dict()
    assert stored.keys() == head.state_dict().keys()
    assert all(torch.equal(stored[name], value.half().float()) for name, value in head.state_dict().items())
    assert files.card == {"seed": 3}
    load_head(str(tmp_path), target)


def test_the_embedded_target_is_named_by_its_id_on_the_hub(tmp_path: Path) -> None:
    """Guards against a head that other engines cannot load, as they do not know this package's name of its target."""
    fingerprint = target_fingerprint(lm("llama"))
    for name, written in ((EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct"), ("a/model", "a/model")):
        write_eagle3(tmp_path, Variant().head(), None, replace(fingerprint, target=name), ["Model"], {}, "# A head\n")
        files = read_eagle3(tmp_path)
        assert files.config["speculators_config"]["verifier"]["name_or_path"] == written
        assert files.fingerprint is not None
        assert files.fingerprint.target == name


def test_keys_that_heads_share_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the slow attention of a GPU, which repeats shared keys if there is a mask."""
    attention, calls = nn.functional.scaled_dot_product_attention, []
    target = lm("llama")  # which attends when it is built

    def noted(query: Tensor, key: Tensor, *others: Any, **rest: Any) -> Tensor:
        calls.append((query.shape[1], key.shape[1]))
        return attention(query, key, *others, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    bound = BoundHead(Variant().head(), target)
    read = ForwardInput(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.ones(2, 2).bool().tril(), rows=2)
    bound.read(bound.new_slots(2), read, torch.ones(2, 96, device=models.DEVICE).double(), fuse=True)
    assert calls == [(2, 2)]


def test_tokens_beyond_its_own_embeddings_are_not_drafted_after() -> None:
    """Guards against an index error, or an assertion on a GPU that ends the process, after a token that was added to
    the target's vocabulary."""
    target = lm("llama")
    shape = replace(head_shape(target, (0, 1, 2)), own_embeddings=True, own_output=True)
    shape.decoder.vocab_size = 50
    head = BoundHead(Eagle3Head(shape, torch.arange(50)), target)
    assert head.vocab_size == 50
    text = [*prompt(), 60]
    drafter = HeadDrafter(head)
    result = generate(target, text, drafter=drafter, max_new_tokens=12)
    assert result.tokens == generate(target, text, max_new_tokens=12).tokens
    assert drafter.forwards == 0


def test_original_files_are_read(tmp_path: Path) -> None:
    """Guards against original heads by the paper's authors that are refused, or wired differently."""
    target, source, original = lm("llama"), write_head(lm("llama"), tmp_path), tmp_path / "original"
    original.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = {name.replace("layers.0.", "midlayer."): x for name, x in load_file(source / "model.safetensors").items()}
    assert sum(name.startswith("midlayer.") for name in tensors) == 10
    torch.save(tensors, original / "pytorch_model.bin")
    ids = config["eagle_aux_hidden_state_layer_ids"]
    decoder = config["transformer_layer_config"]
    sizes = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["draft_vocab_size"], **decoder}
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True, "fc_norm": True}}
    text = [*prompt(11)]
    expected = generate(target, text, drafter=HeadDrafter(load_head(str(source), target)), max_new_tokens=LENGTH)
    for given in (sizes | nested, sizes | {"eagle_aux_hidden_state_layer_ids": ids, "fc_norm": True}):
        (original / "config.json").write_text(json.dumps(given))
        result = generate(target, text, drafter=HeadDrafter(load_head(str(original), target)), max_new_tokens=LENGTH)
        assert result.tokens == expected.tokens
        assert [step.drafted for step in result.steps] == [step.drafted for step in expected.steps]
        assert result.accepted == expected.accepted
    # Without ids in the config, the default ones apply.
    (original / "config.json").write_text(json.dumps(sizes | {"fc_norm": True}))
    assert read_eagle3(original).layers(8) == (1, 3, 4)


def test_frequencies_keep_their_digits() -> None:
    """Guards against rotary positions in 16 bit, which are wrong by whole tokens far into a text."""
    for kind in (torch.float16, torch.bfloat16):
        target = LM(moved(build(ARCHITECTURES["llama"]).to(kind), "cpu"))
        bound = BoundHead(_head("half", (0, 1, 3), "llama", (), 60, ()), target)
        tables = dict(bound._head.named_buffers())
        exact = dict(_head("half", (0, 1, 3), "llama", (), 60, ()).float().named_buffers())
        assert bound._head.fc.weight.dtype == kind
        assert tables["_rotary.inv_freq"].dtype == torch.float32
        assert torch.equal(tables["_rotary.inv_freq"], exact["_rotary.inv_freq"])


def damaged(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without(folder: Path, name: str) -> None:
    save_file(
        {key: x for key, x in load_file(folder / "model.safetensors").items() if key != name},
        folder / "model.safetensors",
    )


def with_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")


def with_decoder(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    damaged(folder, transformer_layer_config=config["transformer_layer_config"] | changes)


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (lambda f: without(f, "fc.weight"), ModelFileError, r"does not fit its config\.json: it lacks fc\.weight"),
        (lambda f: without(f, "fc_norm.1.weight"), ModelFileError, r"it lacks fc_norm\.1\.weight"),
        (lambda f: damaged(f, fc_norm=False), ModelFileError, r"it has fc_norm\.0\.weight, .* besides"),
        (
            lambda f: with_tensor(f, "input_norm.weight", torch.ones(96)),
            ModelFileError,
            r"has input_norm\.weight besides",
        ),
        (
            lambda f: with_decoder(f, num_attention_heads=5),
            ModelFileError,
            r"does not fit its config\.json: .*hidden size \(32\) is not a multiple of",
        ),
        (
            lambda f: with_decoder(f, num_attention_heads="4"),
            ModelFileError,
            r"does not fit its config\.json: .*num_attention_heads",
        ),
        (lambda f: with_decoder(f, intermediate_size=40), ModelFileError, r"does not fit its config\.json: .*mlp"),
        (lambda f: damaged(f, eagle_aux_hidden_state_layer_ids=[1, 2]), ModelFileError, "does not fit"),
        (lambda f: damaged(f, eagle_aux_hidden_state_layer_ids=[1, 2, 5]), UnsupportedModelError, "as it has 4 layers"),
        (lambda f: with_tensor(f, "d2t", torch.arange(33)), ModelFileError, "d2t and t2d .* doctor --head"),
        (lambda f: with_tensor(f, "d2t", -torch.arange(33)), ModelFileError, "names a token twice"),
        (lambda f: damaged(f, draft_vocab_size=20), ModelFileError, "is for 33 tokens, not for 20"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), ModelFileError, "cannot read the draft head"),
        (lambda f: (f / "model.safetensors").unlink(), ModelFileError, "holds no weights"),
        (lambda f: (f / "config.json").write_text("{"), ModelFileError, "cannot read the draft head"),
        (lambda f: (f / "config.json").write_text("{}"), ModelFileError, "holds no EAGLE-3 head"),
        (
            lambda f: (without(f, "d2t"), (f / "config.json").write_text('{"speculators_model_type": "eagle3"}')),
            ModelFileError,
            r"does not fit its config\.json: 'transformer_layer_config'",
        ),
        (lambda f: (f / "config.json").unlink(), ModelFileError, r"holds no config\.json"),
        (lambda f: damaged(f, speculators_model_type="dflash"), ModelFileError, "a draft of the type 'dflash'"),
        (lambda f: with_decoder(f, model_type="mistral"), UnsupportedModelError, "decoder layers of mistral"),
        (lambda f: with_decoder(f, hidden_act="gelu"), UnsupportedModelError, "decoder layers with gelu"),
        (
            lambda f: with_decoder(f, model_type="qwen3", layer_types=["sliding_attention"], use_sliding_window=True),
            UnsupportedModelError,
            "with sliding_attention",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(
    damage: Any, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    """Guards against a head that silently drafts with half of its weights, or with another wiring."""
    folder = write_head(lm("llama"), tmp_path)
    load_head(str(folder), lm("llama"))
    damage(folder)
    with pytest.raises(error, match=sentence) as raised:
        load_head(str(folder), lm("llama"))
    assert "\n" not in str(raised.value)
