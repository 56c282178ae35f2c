"""EAGLE-3 heads against `speculators`, the package of their format.

Each package reads the other's files, and both compute the same.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from specdecode import LM, DraftTree, FixedK, HeadDrafter, StaticTree, generate, load_head
from specdecode.controllers.base import Limit
from specdecode.drafters.base import Context
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import WEIGHTS, make_eagle3, read_eagle3, write_eagle3
from specdecode.heads.fingerprint import target_fingerprint
from tests.helpers.models import ARCHITECTURES, VOCABULARY, build, continuation, prompt

pytestmark = [
    # In its own environment the package must be there.
    pytest.mark.skipif(
        not (os.environ.get("SPECDECODE_SPECULATORS") or find_spec("speculators")),
        reason="needs the package `speculators`; tox -e heads installs it",
    ),
    # The package and its imports warn about changes in later versions.
    pytest.mark.filterwarnings("default"),
]

LAYERS, HIDDEN, DRAFT_VOCABULARY = 6, 32, 40
TOLERANCE = 1e-5
STEPS = 3

Flags = tuple[str, ...]
FLAGS: list[Flags] = [
    tuple(flag for flag in flags if flag)
    for flags in itertools.product(("", "norm_before_residual"), ("", "norm_before_fc", "fc_norm"), ("", "norm_output"))
]
DECODERS: dict[str, type[LlamaConfig] | type[Qwen3Config]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
# The embeddings are 0, and the last layer's output is 6.
IDS = ((2, 3, 5), (0, 6), (5, 1), (6,), (6, 3, 0, 1))
# All kinds that have an effect within the few tokens below.
ROTARY: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
)


@dataclass(frozen=True)
class Variant:
    """The settings in which heads may differ."""

    flags: Flags = ()
    decoder: str = "llama"
    layers: int = 1
    whole_vocabulary: bool = False
    ids: tuple[int, ...] = IDS[0]
    rotary: dict[str, Any] = field(default_factory=ROTARY[0].copy)
    bias: bool = False


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """Return a target in float32, as `speculators` has it. Its name is its folder."""
    folder = tmp_path_factory.mktemp("target")
    model = build(ARCHITECTURES["llama"] | {"num_hidden_layers": LAYERS}).float()
    model.save_pretrained(folder)
    return LM(model, name=str(folder))


def config(variant: Variant, target: LM) -> Any:
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    biases = {"attention_bias": variant.bias} | ({"mlp_bias": variant.bias} if variant.decoder == "llama" else {})
    decoder = DECODERS[variant.decoder](
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=variant.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        rope_parameters=dict(variant.rotary),
        **biases,
    )
    decoder._attn_implementation = "eager"
    return Eagle3SpeculatorConfig(
        transformer_layer_config=decoder,
        draft_vocab_size=VOCABULARY if variant.whole_vocabulary else DRAFT_VOCABULARY,
        eagle_aux_hidden_state_layer_ids=list(variant.ids),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(target.name),
        ),
        **dict.fromkeys(variant.flags, True),
    )


def made_there(variant: Variant, target: LM) -> Any:
    """Build a head of `speculators` with random weights. Its logits have a spread of several units."""
    from speculators.models.eagle3 import Eagle3DraftModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = Eagle3DraftModel(config(variant, target)).eval()
        if not variant.whole_vocabulary:
            tokens = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
            known = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill_(0, tokens, True)
            model.load_vocab_mappings(known, tokens - torch.arange(DRAFT_VOCABULARY))
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                # Weights of a linear layer, a bias, or an embedding.
                weight.normal_(std=0.5 if weight.ndim == 1 else 1.0 if "embed" in name else weight.shape[1] ** -0.5)
        model.lm_head.weight.mul_(2.0)
    return model


@torch.no_grad()
def their_logits(model: Any, features: Tensor, tokens: Tensor, steps: int = STEPS) -> list[Tensor]:
    """Return the logits at each token and in the `steps - 1` drafts behind it, whose tokens are the text's. [n, D] each

    Args:
        model: of `speculators`.
        features: the target's hidden states at the tokens before these, [n, F].
        tokens: of the text, [n].
        steps: the number of drafted steps.
    """
    logits: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    try:
        model(features[None], tokens[None], torch.zeros_like(tokens)[None], ttt_steps=steps)
    finally:
        handle.remove()
    # No tokens follow the last ones.
    return [rows[: len(tokens) - step] for step, rows in enumerate(logits)]


@torch.no_grad()
def our_logits(
    head: Eagle3Head, embedding: nn.Module, rows: Tensor, features: Tensor, tokens: Tensor, steps: int = STEPS
) -> list[Tensor]:
    """Return the same logits, by this package's module."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def store(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        before = kept.get(layer, (keys[:, :, :0], values[:, :, :0]))
        kept[layer] = (torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2))
        return kept[layer]

    count, state, logits = len(tokens), head.fused(features[None]), []
    own = torch.eye(count, dtype=torch.bool)
    visible = torch.ones_like(own).tril()
    for step in range(steps):
        following = torch.cat([tokens[step:], tokens[:step]])
        state = head(embedding(following)[None], state, torch.arange(count) + 1 + step, store, visible)
        logits.append(head.logits(state, rows)[0, : count - step])
        visible = torch.cat([visible, own], 1)
    return logits


def text_of(target: LM, ids: Sequence[int], count: int = 9) -> tuple[Tensor, Tensor]:
    """Return a text's tokens without the first, and the target's hidden states at all tokens but the last."""
    tokens = torch.tensor([(17 * i * i + 5 * i + 3) % VOCABULARY for i in range(count)])
    return tokens[1:], features(target, tokens.tolist(), ids)[:-1]


@torch.no_grad()
def features(target: LM, tokens: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the hidden states that these ids mean in the format, by transformers. [n, F]"""
    last: list[Tensor] = []
    # transformers returns the last hidden states after the final norm.
    handle = target.model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    try:
        told = target.model(torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    states = [*told[:-1], *last]
    assert len(states) == LAYERS + 1
    return torch.cat([states[i][0] for i in ids], -1)


def assert_same(ours: list[Tensor], theirs: list[Tensor], variant: Any) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (logits, expected) in enumerate(zip(ours, theirs, strict=True)):
        # Logits near zero would be close to any others.
        assert expected.std() > 1.5
        assert expected.amax() - expected.amin() > 6.0
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=TOLERANCE, msg=lambda message, at=step: f"{variant}, step {at}: {message}"
        )


def save_there(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def variants(flags: Flags) -> Iterator[Variant]:
    """Yield heads with these flags in all combinations. The ids alternate instead of being combined."""
    choices = itertools.product(DECODERS, (1, 2), (False, True), ROTARY, (False, True))
    for number, (decoder, layers, whole, rotary, bias) in enumerate(choices):
        yield Variant(flags, decoder, layers, whole, IDS[number % len(IDS)], rotary, bias)


each_flags = pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "plain")


@each_flags
def test_logits_are_theirs(flags: Flags, target: LM, tmp_path: Path) -> None:
    """Guards against logits other than those of `speculators`: by a norm that is missing, doubled or of another state,
    a residual from the wrong place, layers in another order, another kind of rotary positions, or a lost bias or query
    norm.
    """
    for number, variant in enumerate(variants(flags)):
        there = made_there(variant, target)
        tokens, states = text_of(target, variant.ids)
        files = read_eagle3(save_there(there, tmp_path / str(number)))
        head = make_eagle3(files, LAYERS, HIDDEN).eval()
        assert [layer + 1 for layer in head.shape.layers] == list(variant.ids)
        assert head.embed_tokens is not None
        assert head.lm_head is not None
        ours = our_logits(head, head.embed_tokens, head.lm_head.weight, states, tokens)
        assert_same(ours, their_logits(there, states, tokens), variant)


def their_chain(model: Any, states: Tensor, tokens: Sequence[int], length: int) -> list[int]:
    """Return the tokens that a model of `speculators` proposes behind a text, each its most probable one.

    Args:
        model: of `speculators`.
        states: the target's hidden states at all tokens but the last, [n - 1, F].
        tokens: of the text, [n].
        length: the number of tokens.
    """
    proposed: list[int] = []
    for step in range(length):
        # Tokens behind the text have no hidden states. A draft's step reads the state of the step before instead.
        read = torch.tensor([*tokens[1:], *proposed])
        padded = torch.cat([states, states.new_zeros(step, states.shape[1])])
        token = int(their_logits(model, padded, read, step + 1)[step][len(tokens) - 2].argmax())
        proposed.append(token + (0 if model.d2t is None else int(model.d2t[token])))
    return proposed


def assert_proposals_are_theirs(model: Any, folder: Path, target: LM, ids: Sequence[int], length: int = 20) -> Any:
    """Decode with a head from its folder, and assert that every proposed chain equals that of `speculators`."""
    head, proposed = load_head(str(folder), target), []

    class Listening(HeadDrafter):
        def propose(self, context: Context, limit: Limit) -> DraftTree:
            tree = super().propose(context, limit)
            proposed.append((list(context.tokens), tree.tokens.tolist()))
            return tree

    result = generate(target, prompt(), drafter=Listening(head), controller=FixedK(STEPS), max_new_tokens=length)
    plain = continuation(target.model, prompt(), length)
    assert result.tokens == plain
    states = features(target, [*prompt(), *plain], ids)
    first, *later = proposed
    assert not first[1]
    assert len(later) > 4
    for tokens, chain in later:
        assert chain == their_chain(model, states[: len(tokens) - 1], tokens, len(chain)), tokens
    assert len({token for _, chain in later for token in chain}) > 3
    return result


@each_flags
def test_a_drafter_proposes_what_they_would(flags: Flags, target: LM, tmp_path: Path) -> None:
    """Guards against a head that is right on a whole text but reads other hidden states, positions or slots when it
    drafts, and against ids of its vocabulary read as the target's.
    """
    every_seventh = itertools.islice(variants(flags), FLAGS.index(flags) % 7, None, 7)
    for number, variant in enumerate(every_seventh):
        there = made_there(variant, target)
        folder = save_there(there, tmp_path / str(number))
        assert_proposals_are_theirs(there, folder, target, variant.ids)


@pytest.mark.parametrize(
    "variant",
    [
        Variant(("norm_before_residual", "fc_norm", "norm_output"), "qwen3", 2, ids=(6, 0, 3)),
        Variant(("norm_before_fc",), "llama", 1, whole_vocabulary=True, rotary=ROTARY[1], bias=True),
    ],
    ids=["qwen3", "llama"],
)
def test_a_head_that_was_trained_there_is_accepted_here(variant: Variant, target: LM, tmp_path: Path) -> None:
    """Guards against a trained head that is never accepted because hidden states, positions or tokens are one off from
    training. Equal logits on a test's own inputs do not show that.
    """
    there = made_there(variant, target)
    text = [*prompt(), *continuation(target.model, prompt(), 40)]
    if there.d2t is not None:
        # The text's tokens first, without those of its end.
        tokens = torch.tensor(sorted(list(dict.fromkeys([*text[:-8], *range(VOCABULARY)]))[:DRAFT_VOCABULARY]))
        known = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill_(0, tokens, True)
        there.load_vocab_mappings(known, tokens - torch.arange(DRAFT_VOCABULARY))
    states = features(target, text, [*variant.ids, LAYERS])
    train_there(there, torch.tensor(text), *states.split([len(variant.ids) * HIDDEN, HIDDEN], 1))
    result = assert_proposals_are_theirs(there, save_there(there, tmp_path), target, variant.ids, 40)
    assert result.mean_acceptance_length > 2.0
    assert result.rejections > 0
    tree = HeadDrafter(load_head(str(tmp_path), target), StaticTree((2, 2, 1)))
    branched = generate(target, prompt(), drafter=tree, controller=FixedK(STEPS), max_new_tokens=40)
    assert branched.tokens == result.tokens
    assert branched.mean_acceptance_length > 2.0


def train_there(model: Any, text: Tensor, states: Tensor, last: Tensor) -> None:
    """Train a model of `speculators` on a text, by its own loss over batches that it shifts itself."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import shift_batch

    # Load the target's output weights. The head keeps its own embeddings.
    model.load_verifier_weights()
    batch = shift_batch(
        {
            "input_ids": text,
            "hidden_states": states,
            "verifier_last_hidden_states": last,
            "loss_mask": torch.ones_like(text, dtype=torch.bool),
            "lengths": torch.tensor([len(text)]),
            "position_ids": torch.arange(len(text)),
        }
    )
    inputs = {
        name: batch[name][None]
        for name in ("hidden_states", "input_ids", "loss_mask", "position_ids", "verifier_last_hidden_states")
    }
    inputs["document_ids"] = torch.zeros_like(inputs["input_ids"])
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    # The other losses need a GPU's compiler.
    losses = resolve_loss_config("kl_div", "eager")
    for _ in range(100):
        _, loss, _ = model(**inputs, ttt_steps=STEPS, loss_config=losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("whole_vocabulary", [False, True], ids=["reduced", "whole"])
@pytest.mark.parametrize("lacks", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")], ids="+".join)
def test_what_a_folder_lacks_is_the_targets(
    lacks: tuple[str, ...], whole_vocabulary: bool, target: LM, tmp_path: Path
) -> None:
    """Guards against an embedding that is not shared with the target, or whose rows belong to other tokens."""
    variant = Variant(("fc_norm",), whole_vocabulary=whole_vocabulary, ids=(0, 4))
    folder = save_there(made_there(variant, target), tmp_path)
    kept = {name: x for name, x in load_file(folder / WEIGHTS).items() if not name.startswith(lacks)}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    tokens, states = text_of(target, variant.ids)
    assert_same(bound_logits(folder, target, states, tokens), loaded_there(folder, states, tokens), variant)


def loaded_there(folder: Path, states: Tensor, tokens: Tensor) -> list[Tensor]:
    """Return the logits of a folder that `speculators` loads."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    there = Eagle3SpeculatorConfig.from_pretrained(folder)
    there.transformer_layer_config._attn_implementation = "eager"
    # Otherwise the weights would get the config's dtype.
    model = Eagle3DraftModel.from_pretrained(folder, config=there, dtype=torch.float32).eval()
    # `speculators` takes missing weights from the target where it finds NaN. transformers leaves them uninitialised.
    stored = load_file(folder / WEIGHTS)
    lacks = {f"overwrite_{name}": f"{name}.weight" not in stored for name in ("embed_tokens", "lm_head")}
    model._load_verifier_weights(**lacks)
    return their_logits(model, states, tokens)


def bound_logits(folder: Path, target: LM, states: Tensor, tokens: Tensor) -> list[Tensor]:
    """Return the logits of a folder that is bound to its target here."""
    bound = load_head(str(folder), target)
    assert isinstance(bound._head, Eagle3Head)
    rows = bound._rows.weight
    assert isinstance(rows, Tensor)
    return our_logits(bound._head, bound._embedding, rows, states, tokens)


@each_flags
def test_what_is_written_here_is_loaded_there(flags: Flags, target: LM, tmp_path: Path) -> None:
    """Guards against a folder whose config or tensors mean something else to `speculators` than to this package."""
    for number, variant in enumerate(itertools.islice(variants(flags), FLAGS.index(flags) % 5, None, 5)):
        folder = tmp_path / str(number)
        head = make_eagle3(read_eagle3(save_there(made_there(variant, target), folder)), LAYERS, HIDDEN)
        assert head.lm_head is not None
        if number % 2:
            head.embed_tokens = None
        written = folder / "written"
        fingerprint, names = target_fingerprint(target), ["LlamaForCausalLM"]
        write_eagle3(written, head, head.lm_head.weight, fingerprint, names, {}, "A page.")
        assert ("embed_tokens.weight" in load_file(written / WEIGHTS)) == (not number % 2)
        tokens, states = text_of(target, variant.ids)
        assert_same(bound_logits(written, target, states, tokens), loaded_there(written, states, tokens), variant)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "variant", [Variant(), Variant(whole_vocabulary=True, ids=(6, 3, 1), rotary=ROTARY[1], bias=True)], ids=str
)
def test_original_files_are_what_their_converter_makes_of_them(
    variant: Variant, file: str, target: LM, tmp_path: Path
) -> None:
    """Guards against original files whose names, sizes or rotary positions are misread."""
    from speculators.convert.eagle import Eagle3Converter

    model = made_there(variant, target)
    original, converted = tmp_path / "original", tmp_path / "converted"
    write_original(original, file, model)
    Eagle3Converter().convert(
        original, converted, target.name, validate=False, eagle_aux_hidden_state_layer_ids=list(variant.ids)
    )
    tokens, states = text_of(target, variant.ids)
    expected = loaded_there(converted, states, tokens)
    assert_same(expected, their_logits(model, states, tokens), variant)
    for folder in (original, converted):
        assert_same(bound_logits(folder, target, states, tokens), expected, folder.name)


def write_original(folder: Path, file: str, model: Any) -> None:
    """Write a head in the format of the EAGLE-3 authors."""
    decoder = model.config.transformer_layer_config
    rotary = dict(decoder.rope_parameters)
    theta = rotary.pop("rope_theta")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    values = {name: getattr(decoder, name) for name in (*names, "rms_norm_eps", "hidden_act", "attention_bias")}
    values |= {"num_hidden_layers": 1, "max_position_embeddings": 128, "rope_theta": theta, "torch_dtype": "float32"}
    values |= {"draft_vocab_size": model.config.draft_vocab_size, "mlp_bias": decoder.mlp_bias}
    values |= {"rope_scaling": None if rotary["rope_type"] == "default" else rotary}
    values |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": model.config.eagle_aux_hidden_state_layer_ids}}
    folder.mkdir()
    top = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(top | values))
    tensors = {
        name.replace("layers.0.", "midlayer."): x.contiguous()
        for name, x in model.state_dict().items()
        if not name.startswith("verifier_")
    }
    if file == WEIGHTS:
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
