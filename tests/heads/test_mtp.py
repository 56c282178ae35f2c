"""MTP layers of a checkpoint as drafts, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, cache_utils, modeling_layers

from specdecode import (
    LM,
    BestFirstTree,
    Chain,
    FixedK,
    HeadDrafter,
    Sampling,
    StaticTree,
    UnsupportedModelError,
    generate,
    generate_batch,
    load_mtp,
)
from specdecode.backends import Backend
from specdecode.backends.static import StaticRunner
from specdecode.controllers.base import Limit
from specdecode.core.errors import ModelFileError
from specdecode.core.sampling import Rng
from specdecode.drafters.base import Context
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.heads.bound import BoundHead
from specdecode.models.recording import recorded_hidden_states
from tests.helpers.heads import MTP_FAMILIES, write_mtp
from tests.helpers.models import WINDOW, continuation, lm, prompt

LENGTH = 24
SHAPES: tuple[TreeShape, ...] = (Chain(), StaticTree((3, 2, 1)), BestFirstTree(nodes=10, threshold=0.001))


@pytest.fixture(scope="module", params=MTP_FAMILIES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = write_mtp(request.param, tmp_path_factory.mktemp(request.param))
    # Grouped products of experts do not support float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    return LM(model, name=request.param)


@pytest.fixture(scope="module")
def head(target: LM) -> BoundHead:
    return load_mtp(target)


def states_of(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1]


def reference(
    model: PreTrainedModel, text: Sequence[int], length: int, read: Sequence[int] = ()
) -> tuple[list[int], list[Tensor]]:
    """Return the chain that transformers' own module drafts behind a text, and its logits. It reuses one layer for all
    tokens. If tokens to read are given, it reads them in place of its own.
    """
    own = modeling_layers.MtpModel.from_pretrained(model)
    cache = cache_utils.MtpCache(config=model.config.get_mtp_config())
    tokens, states = torch.tensor([text[1:]]), states_of(model, text)[:, :-1]
    positions, chosen, logits = torch.arange(1, len(text))[None], [], []
    with torch.inference_mode():
        for step in range(length):
            out = own.forward_layer(0, states, positions, cache, input_ids=tokens)
            logits.append(own._project_to_logits(out[:, -1]))
            chosen.append(int(logits[-1].argmax(-1)))
            tokens = torch.tensor([[read[step] if read else chosen[-1]]])
            states, positions = out[:, -1:], positions[:, -1:] + 1
    return chosen, logits


def context(target: LM, text: Sequence[int], sampling: Sampling = Sampling()) -> Context:
    last = target.model.config.num_hidden_layers - 1
    with torch.inference_mode(), recorded_hidden_states(target.model, [last]) as recorded:
        target.model(torch.tensor([list(text)]), use_cache=False)
    return Context(list(text), target.vocab_size, sampling, Rng(0), recorded[0][0, :-1])


@pytest.mark.parametrize("static", [None, partial(StaticRunner, capture=None)], ids=["eager", "static"])
def test_it_drafts_what_transformers_does(target: LM, static: Callable[..., StaticRunner] | None) -> None:
    """Guards against a state before the final norm, a position that is one off, a state that is read back in another
    form than the layer's output, and a layer with a window that attends to all tokens.
    """
    head = load_mtp(LM(target.model, backend=Backend("of a test", static=static)))
    text = prompt(11)
    assert len(text) > WINDOW + 2
    chosen, logits = reference(target.model, text, 4)
    drafter = HeadDrafter(head)
    for length in (5, 11):
        tree = drafter.propose(context(target, text[:length]), Limit(4))
    assert tree.tokens.tolist() == chosen
    sampling = Sampling(1.0)
    tree = drafter.propose(context(target, text, sampling), Limit(4))
    assert tree.probs is not None
    _, sampled = reference(target.model, text, 4, tree.tokens.tolist())
    # The router of experts computes in float32.
    torch.testing.assert_close(tree.probs, sampling.probs(torch.cat(sampled)), rtol=0, atol=1e-6)
    assert min(step.std() for step in sampled) > 0.5
    tree = HeadDrafter(head, StaticTree((2, 1))).propose(context(target, text), Limit(2))
    assert tree.tokens[:2].tolist() == logits[0][0].topk(2).indices.tolist()
    assert int(tree.tokens[2]) == chosen[1]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_its_drafts_change_no_token(target: LM, head: BoundHead, shape: TreeShape) -> None:
    """Guards against draft tokens that are accepted without verification."""
    plain = continuation(target.model, prompt(), LENGTH)
    result = generate(target, prompt(), drafter=HeadDrafter(head, shape), controller=FixedK(3), max_new_tokens=LENGTH)
    assert result.tokens == plain
    assert result.drafted > len(result.steps)
    assert result.rejections > 0


def test_batches_and_samples_are_those_without_it(target: LM, head: BoundHead) -> None:
    """Guards against hidden states of another prompt."""
    prompts = [list(prompt(14)), list(prompt(9))]
    batch = generate_batch(target, prompts, batch_size=2, drafter=lambda: HeadDrafter(head), max_new_tokens=LENGTH)
    assert [result.tokens for result in batch] == [
        generate(target, text, max_new_tokens=LENGTH).tokens for text in prompts
    ]


def test_it_shares_the_target_s_weights(target: LM, head: BoundHead) -> None:
    """Guards against a second copy of embeddings as wide as the vocabulary."""
    assert head._rows is target.model.get_output_embeddings()
    assert head._embedding is target.model.get_input_embeddings()


def test_it_has_the_type_that_its_target_was_converted_to(target: LM) -> None:
    """Guards against a layer in the type of the checkpoint, which cannot attend beside a mask of the target's."""
    model = AutoModelForCausalLM.from_pretrained(
        target.model.config.name_or_path, dtype=torch.float32, experts_implementation="eager"
    )
    converted = LM(model.bfloat16())
    head = load_mtp(converted)
    result = generate(converted, prompt(), drafter=HeadDrafter(head), max_new_tokens=LENGTH)
    assert result.drafted > 0
    layer = head._head._layer
    assert {weight.dtype for weight in layer.parameters()} == {torch.bfloat16}
    # The weights by which experts are chosen are no parameters, and stay in float32.
    assert {buffer.dtype for buffer in layer.buffers()} <= {torch.float32}


def test_a_target_without_mtp_layers_is_refused(target: LM) -> None:
    """Guards against an obscure error of a loader."""
    with pytest.raises(UnsupportedModelError, match="llama comes with no MTP layers: draft with"):
        load_mtp(lm("llama"))
    name = target.model.config.name_or_path
    target.model.config.name_or_path = "/nowhere"
    try:
        with pytest.raises(ModelFileError, match="cannot load the MTP layers of /nowhere: "):
            load_mtp(target)
    finally:
        target.model.config.name_or_path = name
