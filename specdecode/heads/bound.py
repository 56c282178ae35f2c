"""A draft head that is bound to its target, and the sizes of one that would fit it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from specdecode.backends.cache_views import StaticCacheView
from specdecode.backends.packed import PackedLinear, pack
from specdecode.backends.static import WIDTHS
from specdecode.backends.static_inputs import StaticInputs, visible_slots
from specdecode.core.errors import UnsupportedModelError
from specdecode.core.slots import Slots
from specdecode.core.transfer import moved
from specdecode.heads.eagle3 import Eagle3Head, Eagle3Shape
from specdecode.heads.fingerprint import ADVICE, target_fingerprint
from specdecode.heads.mtp import MtpHead
from specdecode.heads.parts import Store
from specdecode.models.forwards import ForwardInput
from specdecode.models.lm import LM
from specdecode.models.variants import layer_configs

# Number of columns of an output embedding that are computed at once.
_COLUMNS = 64

DraftHead: TypeAlias = Eagle3Head | MtpHead
"""A module that drafts from a target's hidden states and, behind them, from its own states."""


class BoundHead:
    """A copy of a head that is bound to its target. It shares the target's embeddings if it has none of its own.

    The copy has the target's type and device. Its layers are packed, or run by kernels, if the target's are.

    Args:
        head: the head, which is not changed and may be trained further.
        target: the model whose hidden states the head reads.
        copied: False binds the head itself, which must already have the target's type and device.

    Attributes:
        layers: the target's layers whose hidden states the head reads.
        tokens: the D token ids of the target's vocabulary that the head can propose.
        vocab_size: number of tokens that the head can read: its own embeddings may have fewer rows than the target's.

    Raises:
        UnsupportedModelError: the head does not fit the target's layers, embeddings or vocabulary.
    """

    def __init__(self, head: DraftHead, target: LM, *, copied: bool = True) -> None:
        check_fit(head, target)
        self.layers: tuple[int, ...] = head.shape.layers
        self.tokens = head.tokens.to(target.device)
        bound = copy.deepcopy(head).to(target.device, target.dtype) if copied else head
        embedding: nn.Module | None = bound.embed_tokens
        self._embedding: nn.Module = target.model.get_input_embeddings() if embedding is None else embedding
        table: Any = self._embedding.weight
        self.vocab_size = len(table)
        self._head: DraftHead = bound
        self._window = bound.window if isinstance(bound, MtpHead) else None
        rows: nn.Module | None = bound.lm_head
        shared = _whole_output(target, self.tokens) if rows is None else None
        modules = nn.ModuleList([bound, *([] if shared is not None else [rows or _output(target, head.tokens)])])
        modules.train(False).requires_grad_(False)
        packed = next((module for module in target.model.modules() if isinstance(module, PackedLinear)), None)
        if packed is not None:
            pack(modules, packed.layout)
        if target.backend.replace_layers is not None:
            target.backend.replace_layers(modules)
        # Both replace the module, so it is read from the list.
        self._rows = modules[1] if shared is None else shared
        # Two runners over static shapes: the first forward of a proposal reads the target's hidden states, and the next
        # forwards read the head's own states.
        self._write = target.backend.write
        static = target.backend.static_head or target.backend.static
        self._first, self._next = (
            None if static is None else static(partial(self._static_read, fuse)) for fuse in (True, False)
        )

    def new_slots(self, capacity: int) -> Slots:
        """Return empty slots for a sequence, with room for `capacity` tokens at first."""
        device = self.tokens.device
        return Slots(capacity, device) if self._first is None else self._first.new_slots(capacity, device)

    @torch.inference_mode()
    def read(
        self, slots: Slots, inputs: ForwardInput, states: Float[Tensor, "n _"], *, fuse: bool = False
    ) -> tuple[Float[Tensor, "rows H"], Float[Tensor, "rows D"]]:
        """Read pairs of a token and the state at the token before it, and append their keys and values to the slots.

        Args:
            slots: slots of the head. They grow by n.
            inputs: the n tokens.
            states: the state at the token before each: the head's own, or with `fuse` the target's hidden states.
            fuse: whether the states are the target's hidden states.

        Returns:
            The head's states at the last `inputs.rows` tokens, and the logits there of the D tokens that the head can
                propose.
        """
        tokens, positions, visible = inputs.tokens, inputs.positions, inputs.visible
        slots.append(positions)
        static = self._first if fuse else self._next
        # A head launches few kernels for a prompt, and captured it would compute the logits of all rows.
        if static is not None and len(tokens) <= WIDTHS[-1] and static.takes(slots, len(tokens)):
            state, logits = static.run(slots, tokens, positions, visible, states)
            return state[-inputs.rows :], logits[-inputs.rows :]
        before = torch.ones(len(tokens), slots.length - visible.shape[1], dtype=torch.bool)
        where, mask = moved(positions, slots.device), moved(torch.cat([before, visible], 1), slots.device)
        mask = self._near(mask, where, slots.positions[: slots.length])
        state = self._states(moved(tokens, slots.device), states, where, slots.update, mask, fuse)[-inputs.rows :]
        return state, self._logits(state)

    @torch.inference_mode()
    def continue_greedily(
        self, slots: Slots, inputs: ForwardInput, hidden_states: Float[Tensor, "n F"], count: int
    ) -> Int[Tensor, " count"]:
        """Read tokens with the target's hidden states, and continue with the head's most probable tokens. No forward
        waits for the host.

        Args:
            slots: slots of the head. They grow by n + count - 1: the last new token is not read.
            inputs: the n tokens.
            hidden_states: the target's hidden states at the token before each of these.
            count: number of new tokens, at least 1.

        Returns:
            The new tokens, as ids of the target's vocabulary on the device.
        """
        tokens, positions, visible = inputs.tokens, inputs.positions, inputs.visible
        last = int(positions[-1])
        if self._first is not None and self._first.takes_chain(slots, len(tokens), count - 1):
            slots.append(torch.cat([positions, torch.arange(last + 1, last + count)]))
            chain = partial(self._chain, count)
            reads = (slots, tokens, positions, visible, hidden_states)
            return self._first.replay(*reads, forward=chain, ahead=count - 1, kind=(count,))[0].clone()
        state, logits = self.read(slots, inputs, hidden_states, fuse=True)
        chosen = [self.tokens[logits.argmax(-1)]]
        for ahead in range(1, count):
            own = torch.ones(1, ahead, dtype=torch.bool)
            state, logits = self.read(slots, ForwardInput(chosen[-1], torch.tensor([last + ahead]), own, 1), state)
            chosen.append(self.tokens[logits.argmax(-1)])
        return torch.cat(chosen)

    def _states(
        self,
        tokens: Int[Tensor, " n"],
        states: Float[Tensor, "n _"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
        fuse: bool,
    ) -> Float[Tensor, "n H"]:
        own = self._head.fused(states) if fuse else states
        read: Tensor = self._head(self._embedding(tokens)[None], own[None], positions, store, visible)
        return read[0]

    def _near(
        self, visible: Bool[Tensor, "n s"], positions: Int[Tensor, " n"], slot_positions: Int[Tensor, " s"]
    ) -> Bool[Tensor, "n s"]:
        """Return a mask of the visible slots within the window of the head's attention, if it has one."""
        return visible if self._window is None else visible & (positions[:, None] - slot_positions < self._window)

    def _logits(self, state: Float[Tensor, "n H"]) -> Float[Tensor, "n D"]:
        logits: Tensor = self._rows(self._head.normed(state))
        return moved(logits, state.device)  # the target's output layer may lie elsewhere

    def _static_read(
        self,
        fuse: bool,
        inputs: StaticInputs,
        positions: Tensor,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
    ) -> tuple[Float[Tensor, "W H"], Float[Tensor, "W D"]]:
        """Return the states and the logits of a forward over static shapes, computed completely on the device."""
        assert inputs.states is not None
        places = inputs.start + torch.arange(len(inputs.tokens), device=positions.device)
        view = StaticCacheView(keys, values, places, positions, self._write)
        mask = self._near(visible_slots(inputs, len(positions)), inputs.positions, positions)
        state = self._states(inputs.tokens, inputs.states, inputs.positions, view.update, mask, fuse)
        return state, self._logits(state)

    def _chain(
        self,
        count: int,
        inputs: StaticInputs,
        positions: Tensor,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
    ) -> tuple[Tensor]:
        """Return the tokens of `continue_greedily`, computed over static shapes."""
        assert self._first is not None
        assert self._next is not None
        assert inputs.last is not None
        row = inputs.last[None]
        position = inputs.positions.index_select(0, row)
        read = self._first.forward(inputs, positions, keys, values)
        state, logits = (output.index_select(0, row) for output in read)
        chosen = [self.tokens[logits.argmax(-1)]]
        for ahead in range(1, count):
            place = inputs.start + row[0] + ahead
            itself = torch.ones(1, 1, dtype=torch.bool, device=place.device)
            # Not one tensor twice: code that was compiled for that fits no other inputs.
            now = StaticInputs(chosen[-1], position + ahead, place, place.clone(), itself, state)
            state, logits = self._next.forward(now, positions, keys, values)
            chosen.append(self.tokens[logits.argmax(-1)])
        return (torch.cat(chosen),)


def check_fit(head: DraftHead, target: LM) -> None:
    """Raise UnsupportedModelError if a head does not fit a target's layers, embeddings or vocabulary."""
    shape, target_is = head.shape, target_fingerprint(target)
    total, width = target_sizes(target)
    shares = head.embed_tokens is None or head.lm_head is None
    difference = ""
    if width != shape.target_hidden or not -1 <= min(shape.layers) <= max(shape.layers) < total:
        difference = f"it has {total} layers of width {width}"
    elif shares and target_is.rows.shape[1] != shape.hidden:
        difference = f"it embeds tokens in width {target_is.rows.shape[1]}"
    elif not 0 <= head.tokens.min() <= head.tokens.max() < target_is.vocab_size:
        difference = f"it knows tokens 0 to {target_is.vocab_size - 1}"
    elif head.embed_tokens is not None and head.tokens.max() >= head.embed_tokens.num_embeddings:
        difference = f"the head itself embeds tokens 0 to {head.embed_tokens.num_embeddings - 1}"
    if difference:
        raise UnsupportedModelError(
            f"a head over layers {', '.join(map(str, shape.layers))} of width {shape.target_hidden} that proposes"
            f" tokens up to {int(head.tokens.max())} cannot draft for {target.name}, as {difference}: {ADVICE}"
        )


def _whole_output(target: LM, tokens: Int[Tensor, " D"]) -> nn.Module | None:
    """Return a target's output layer if it has no bias and gives the logits of exactly these tokens; else None."""
    layer = target.model.get_output_embeddings()
    whole = len(tokens) == target.vocab_size and torch.equal(tokens, torch.arange(len(tokens), device=tokens.device))
    return layer if whole and layer is not None and getattr(layer, "bias", None) is None else None


def _output(target: LM, tokens: Int[Tensor, " D"]) -> nn.Linear:
    """Return an output layer with the rows of a target's output embedding for some tokens."""
    rows = output_rows(target, tokens)
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(rows)
    return layer


@torch.no_grad()
def output_rows(target: LM, tokens: Int[Tensor, " D"]) -> Float[Tensor, "D H"]:
    """Return the rows of a target's output embedding for some tokens, without the bias.

    Packed and quantised layers have no plain weight to read. Their columns are computed, as the outputs for unit
    vectors. This needs V x H x H multiplications, so plain layers are read directly.

    Raises:
        UnsupportedModelError: the target has no output embedding.
    """
    layer = target.model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModelError(f"{target.name} has no output embedding that a head could share")
    layer = getattr(layer, "layer", layer)  # a kernel may be around the layer
    chosen = tokens.to(target.device)
    if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
        weight = layer.weight.detach()
        return moved(weight[moved(tokens, weight.device)], target.device)
    _, width = target_sizes(target)
    options: dict[str, Any] = {"dtype": target.dtype, "device": target.device}

    def outputs(inputs: Tensor) -> Tensor:
        return moved(layer(inputs), target.device)[:, chosen]

    bias = outputs(torch.zeros(1, width, **options))
    columns = [outputs(units) - bias for units in torch.eye(width, **options).split(_COLUMNS)]
    return torch.cat(columns).T.contiguous()


def target_sizes(target: LM) -> tuple[int, int]:
    """Return the number of a target's layers, and the width of its hidden states."""
    return target.config.num_hidden_layers, target.config.hidden_size


def head_shape(target: LM, layers: Sequence[int]) -> Eagle3Shape:
    """Return the shape of a head over some layers of a target, with the sizes of the target's last layer.

    The head normalises each layer's hidden states, since they grow from layer to layer. It shares the target's
    embeddings.

    Args:
        target: the target.
        layers: the target's layers whose hidden states the head reads.

    Raises:
        UnsupportedModelError: the target has a size that a layer of a Llama cannot have.
    """
    config = layer_configs(target.config)[-1]
    # A Llama's heads must divide its width. Those of some targets do not.
    heads = next(count for count in range(config.num_attention_heads, 0, -1) if config.hidden_size % count == 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = getattr(config, "rope_parameters", None) or {}
    whole = rotary.get("partial_rotary_factor", 1.0) == 1.0 and "rope_type" in rotary
    kind = Qwen3Config if config.model_type == "qwen3" else LlamaConfig
    try:
        decoder = kind(
            vocab_size=target.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=math.gcd(heads, getattr(config, "num_key_value_heads", None) or heads),
            # The width must be even, since rotary positions rotate pairs.
            head_dim=max(width // 2, 1) * 2,
            rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-5,
            max_position_embeddings=target.context_length,
            rope_parameters=dict(rotary) if whole else {"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
        )
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"a head cannot have the sizes of {target.name}: {reason}") from error
    return Eagle3Shape(decoder, tuple(layers), config.hidden_size, fc_norm=True, own_output=False)


def untrained(target: LM, seed: int = 0) -> Eagle3Head:
    """Return a head with random weights that can propose a third of the tokens. It has the same costs as a trained
    head."""
    total, _ = target_sizes(target)
    shape = head_shape(target, sorted({total // 4, total // 2, total - 1}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Eagle3Head(shape, torch.arange(0, target.vocab_size, 3))
