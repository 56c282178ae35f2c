"""Recording of attention weights and of the hidden states of selected layers during a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from specdecode.backends.layers import decoder_layers
from specdecode.backends.static import StaticRunner
from specdecode.core.slots import Slots
from specdecode.core.transfer import moved
from specdecode.models.forwards import ForwardInput
from specdecode.models.variants import shared_copy
from specdecode.models.wrapped import execution_device


@contextmanager
def recorded_hidden_states(
    model: PreTrainedModel, layers: Sequence[int]
) -> Iterator[list[Float[Tensor, "rows n hidden"]]]:
    """Record hidden states within this context.

    Args:
        model: the model. It gets forward hooks, which are removed after the context.
        layers: indices of decoder layers; -1 for the input of the first layer. The last layer's hidden states are
            recorded before the model's final norm.

    Yields:
        A list that each forward fills with the hidden states of the layers, in the order of `layers`. All are on the
            device of the model's inputs, wherever the layers lie.

    Raises:
        ValueError: there is no such layer, or the model does not hold its layers in one list.
    """
    hidden_states, handles = _hooked(model, layers)
    try:
        yield hidden_states
    finally:
        for handle in handles:
            handle.remove()


def _hooked(model: PreTrainedModel, layers: Sequence[int]) -> tuple[list[Tensor], list[RemovableHandle]]:
    """Hook layers of a model. Return the list that each forward fills, and the handles of the hooks."""
    stack = decoder_layers(model)
    if stack is None or not all(-1 <= layer < len(stack) for layer in layers):
        total = "no list of layers" if stack is None else f"layers 0 to {len(stack) - 1}"
        raise ValueError(f"{type(model).__name__} has {total}: the outputs of {list(layers)} cannot be read")
    hidden_states, device = [torch.empty(0)] * len(layers), execution_device(model)

    def hook_for(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden_states[place] = moved(output if isinstance(output, Tensor) else output[0], device)

        return hook

    def input_hook_for(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            hidden_states[place] = moved(inputs[0] if inputs else named["hidden_states"], device)

        return hook

    handles = [
        stack[0].register_forward_pre_hook(input_hook_for(place), with_kwargs=True)
        if layer == -1
        else stack[layer].register_forward_hook(hook_for(place))
        for place, layer in enumerate(layers)
    ]
    return hidden_states, handles


@dataclass(frozen=True, slots=True)
class Recorder:
    """A model with hooks that record its hidden states.

    Attributes:
        layers: the layers whose hidden states are recorded.
        model: the model that runs the forwards.
        hidden_states: [rows, n, hidden] the hidden states of each layer in the last forward.
        static: runner of forwards over static shapes, which returns the logits and the hidden states; None for a
            backend without static shapes.
    """

    layers: tuple[int, ...]
    model: PreTrainedModel
    hidden_states: list[Tensor]
    static: StaticRunner | None = None

    def store(self, sequences: Sequence[Slots], inputs: Sequence[ForwardInput]) -> None:
        """Store the hidden states of the last forward in the slots of its sequences."""
        for row, (slots, read) in enumerate(zip(sequences, inputs, strict=True)):
            states = [tensor[row, tensor.shape[1] - len(read.tokens) :] for tensor in self.hidden_states]
            slots.outputs = dict(zip(self.layers, states, strict=True))


class HiddenStateRecording:
    """A switch for the recording of a model's hidden states.

    Args:
        model: the model to record.
        static_runner: builds a runner over static shapes from a model and the list of its hidden states. The runner
            returns the first row's hidden states after the logits. None for a backend without static shapes.

    Attributes:
        recorder: the recorder in use; None if nothing is recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        static_runner: Callable[[PreTrainedModel, list[Tensor]], StaticRunner] | None,
    ) -> None:
        self.recorder: Recorder | None = None
        self._model = model
        self._static_runner = static_runner
        self._static_recorders: dict[tuple[int, ...], Recorder] = {}
        config = model.config.get_text_config(decoder=True)
        self._shares_keys = bool(getattr(config, "num_kv_shared_layers", 0))

    @property
    def needs_all_rows(self) -> bool:
        """Whether a forward must not be told which logits are wanted. Where layers share keys, transformers leaves all
        other rows out from the first of these layers on, so their hidden states would be missing."""
        return self._shares_keys and self.recorder is not None

    @contextmanager
    def record(self, layers: Sequence[int]) -> Iterator[None]:
        """Record the hidden states of these layers within this context. Without layers, record nothing.

        Args:
            layers: as for `recorded_hidden_states`.

        Raises:
            ValueError: as `recorded_hidden_states`.
        """
        outer = self.recorder
        try:
            if not layers:
                self.recorder = None
                yield
            elif self._static_runner is None:
                with recorded_hidden_states(self._model, layers) as hidden_states:
                    self.recorder = Recorder(tuple(layers), self._model, hidden_states)
                    yield
            else:
                self.recorder = self._static_recorder(tuple(layers))
                yield
        finally:
            self.recorder = outer

    def _static_recorder(self, layers: tuple[int, ...]) -> Recorder:
        """Return the recorder of layers over static shapes, which is built once for these layers.

        Compiled and captured code lives as long as the model, and so do its hooks. The hooks are on a copy of the
        modules with the same weights. PyTorch reuses compiled code without a check for hooks, so plain decoding needs
        the code of other modules.
        """
        if layers not in self._static_recorders:
            assert self._static_runner is not None
            model = shared_copy(self._model)
            hidden_states, _ = _hooked(model, layers)
            runner = self._static_runner(model, hidden_states)
            self._static_recorders[layers] = Recorder(layers, model, hidden_states, runner)
        return self._static_recorders[layers]


def store_attention(
    sequences: Sequence[Slots], inputs: Sequence[ForwardInput], attentions: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Store the attention weights of a forward in the slots of its sequences, in float32 or float64.

    Args:
        sequences: slots of the sequences of the forward.
        inputs: input of each sequence.
        attentions: [rows, heads, n, length] attention weights of each layer, with the padding first.
        dtype: type of the model.
    """
    for row, (slots, read) in enumerate(zip(sequences, inputs, strict=True)):
        slots.weights = torch.stack(
            [
                # Several query heads may share a key head, whose slots receive the attention of all of them.
                weights[row, :, weights.shape[2] - len(read.tokens) :, : slots.length]
                .unflatten(0, (keys.shape[0], -1))
                .sum(1)
                .to(torch.promote_types(dtype, torch.float32))
                for weights, keys in zip(attentions, slots.filled_keys(), strict=True)
            ]
        )
