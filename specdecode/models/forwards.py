"""The inputs of a forward over slots, and the forward over static shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdecode.backends.cache_views import SlotWrite, StaticCacheView
from specdecode.backends.grouped_attention import text_rows
from specdecode.backends.static_inputs import StaticInputs
from specdecode.core.slots import SlotBatch, Slots
from specdecode.core.transfer import moved
from specdecode.core.tree import DraftTree
from specdecode.models.masks import MaskForm
from specdecode.models.wrapped import execution_device
from specdecode.policies.base import CachePolicy

# Largest number of prompt tokens in one forward: it bounds the memory of masks and activations, and is still efficient.
PREFILL_CHUNK = 2048
# The same where attention weights are recorded: those of all layers, heads, rows and slots are held at once.
_RECORDED_CHUNK = 256


def prefill_chunk(policy: CachePolicy) -> int:
    """Return the largest number of prompt tokens in one forward."""
    return _RECORDED_CHUNK if policy.reads_attention else PREFILL_CHUNK


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """The input of a forward for one sequence. The fields are the arguments of `LM.forward`."""

    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    visible: Bool[Tensor, "n s"]
    rows: int


class SlotDecoder(Protocol):
    """A model that runs forwards through KV slots, as `LM` does."""

    model: PreTrainedModel
    name: str
    vocab_size: int

    def new_slots(self, capacity: int) -> Slots: ...

    def forward(
        self, slots: Slots, tokens: Int[Tensor, " n"], *, positions: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "_ V"]: ...

    def forward_tree(self, slots: Slots, pending: Sequence[int], tree: DraftTree) -> Float[Tensor, "nodes V"]: ...


def tree_input(slots: Slots, pending: Sequence[int], tree: DraftTree) -> ForwardInput:
    """Return the input for pending tokens and a tree.

    Args:
        slots: slots of the sequence.
        pending: committed tokens that are not in the slots yet. The last is the root.
        tree: the proposals below the root.
    """
    stem, size = len(pending), len(pending) + len(tree)
    tokens = torch.tensor(pending)
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    visible[stem - 1 :, stem - 1 :] = tree.visibility
    # A token attends to its predecessors and itself. So the number of visible tokens gives its position, also for nodes
    # of a tree.
    positions = slots.length + visible.sum(1) - 1
    tokens = torch.cat([moved(tokens, tree.tokens.device), tree.tokens])
    return ForwardInput(tokens, positions, visible, len(tree) + 1)


def run(
    model: PreTrainedModel,
    form: MaskForm,
    cache: Slots | SlotBatch,
    sequences: Sequence[Slots],
    inputs: Sequence[ForwardInput],
    **options: Any,
) -> Any:
    """Run the inputs of several sequences in one forward.

    Args:
        model: the model that runs the forward.
        form: form of the model's masks.
        cache: the slots of all sequences, in the form of the model's cache.
        sequences: slots of each sequence, with the slots for the inputs already reserved.
        inputs: input of each sequence. Shorter inputs are padded at the start.
        options: further arguments of the model.

    Returns:
        The output object of transformers.
    """
    size, device = max(len(read.tokens) for read in inputs), execution_device(model)
    with text_rows(_text(sequences[0], inputs[0]) if len(inputs) == 1 and form.window is None else 0):
        return model(
            input_ids=_stacked([read.tokens for read in inputs], size, device),
            attention_mask=form.masks(sequences, [read.visible for read in inputs], size),
            position_ids=_stacked([read.positions for read in inputs], size, device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )


def _text(slots: Slots, read: ForwardInput) -> int:
    """Return the number of rows at the beginning of an input that are a text from its first token on; 0 if there are
    earlier slots."""
    count = len(read.tokens)
    if count < slots.length:
        return 0
    chain = (read.visible == torch.ones_like(read.visible).tril()).all(1)
    return count if chain.all() else int(chain.int().argmin())


def _stacked(parts: Sequence[Int[Tensor, " _"]], size: int, device: torch.device) -> Int[Tensor, "rows n"]:
    """Stack the sequences as rows of `size` tokens. Padding comes first, so that the wanted logits are at the end of
    each row."""
    return torch.stack([nn.functional.pad(moved(part, device), (size - len(part), 0)) for part in parts])


def static_logits(
    model: PreTrainedModel,
    form: MaskForm,
    inputs: StaticInputs,
    positions: Int[Tensor, " span"],
    keys: Mapping[int, Tensor],
    values: Mapping[int, Tensor],
    write: SlotWrite,
) -> Float[Tensor, "_ V"]:
    """Run a forward over static shapes, completely on the device; see `backends.static.StaticForward`.

    Args:
        model: the model that runs the forward.
        form: form of the model's masks.
        inputs, positions, keys, values: see `StaticForward`.
        write: writes the keys and values of a layer.
    """
    places = inputs.start + torch.arange(len(inputs.tokens), device=positions.device)
    keeps = inputs.wanted is not None and _takes_rows(model)
    logits: Tensor = model(
        input_ids=inputs.tokens[None],
        attention_mask=form.static_masks(inputs, positions),
        position_ids=inputs.positions[None],
        past_key_values=StaticCacheView(keys, values, places, positions, write),
        use_cache=True,
        **({"logits_to_keep": inputs.wanted} if keeps else {}),
    ).logits[0]
    return logits if keeps or inputs.wanted is None else logits.index_select(0, inputs.wanted)


def _takes_rows(model: PreTrainedModel) -> bool:
    """Return whether a model's forward takes the rows of the logits to compute, as those of transformers do. Another
    may take their number alone."""
    keep = inspect.signature(model.forward).parameters.get("logits_to_keep")
    return keep is not None and "Tensor" in str(keep.annotation)
