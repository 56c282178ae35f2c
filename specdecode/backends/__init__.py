"""Backends run the forwards of a model: with transformers' own code, or closer to the hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specdecode.backends import packed
from specdecode.backends.cache_views import SlotWrite, write_to_slots
from specdecode.backends.compiled import compile_layers, compiled
from specdecode.backends.graph import CudaGraphs
from specdecode.backends.grouped_attention import group, switch_attention
from specdecode.backends.kernels import (
    BY_KERNEL,
    BY_KERNEL_ROWS,
    integer_weights,
    interpreted,
    unavailable_reason,
)
from specdecode.backends.layers import decoder_layers
from specdecode.backends.layouts import LAYOUTS, PLAIN, Layout
from specdecode.backends.merged import SameInputs, same_inputs
from specdecode.backends.row_activations import separate_activations
from specdecode.backends.row_attention import by_rows
from specdecode.backends.static import Capture, StaticForward, StaticRunner
from specdecode.core.errors import UnsupportedModelError

BACKENDS = ("auto", "eager", "packed", "exact", "compile", "graph", "triton")


@dataclass(frozen=True, slots=True)
class Backend:
    """The way in which the forwards of one model run.

    Attributes:
        name: one of `BACKENDS`; "eager" is transformers' own code, unchanged.
        note: a sentence on the changes to the model, or the reason why there are none.
        static: builds the runner of a forward over static shapes; None for a backend without static shapes.
        write: writes keys and values in a forward over static shapes.
        replace_layers: replaces the layers that kernels compute in a draft head, in place; None without kernels.
        static_head: builds the runner of a draft head's forward; None if `static` does.
        chosen: whether "auto" chose this backend, so that "eager" may replace it.
        exact: whether the logits of a token are the same to the last bit, whatever tokens are read beside it.
    """

    name: str = "eager"
    note: str = ""
    static: Callable[[StaticForward], StaticRunner] | None = None
    write: SlotWrite = write_to_slots
    replace_layers: Callable[[nn.Module], object] | None = None
    static_head: Callable[[StaticForward], StaticRunner] | None = None
    chosen: bool = False
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def check_name(kind: str) -> None:
    """Raise ValueError for an unknown backend."""
    if kind not in BACKENDS:
        raise ValueError(f"no backend is named {kind!r}: choose from {', '.join(BACKENDS)}")


def check(kind: str, device: torch.device) -> None:
    """Raise ValueError for an unknown backend, or one that needs another device. Call it before loading a model."""
    check_name(kind)
    if kind == "graph" and device.type != "cuda":
        raise ValueError("the backend graph captures CUDA graphs, which need a GPU: use compile, packed or eager")
    if kind in _by_kernels(device) and (reason := unavailable_reason(kind, device)):
        raise ValueError(reason)


def _by_kernels(device: torch.device) -> tuple[str, ...]:
    """Return the backends that run Triton kernels on a device."""
    return ("triton",) if device.type == "cpu" and not interpreted() else ("triton", "exact")


def prepare(kind: str, model: PreTrainedModel, agreed: Callable[[Any], Any] = lambda value: value) -> Backend:
    """Transform a model in place for a backend.

    With every backend but "eager", heads that share keys attend without copying them, and a prompt that is not captured
    attends without a mask (see `backends.grouped_attention`). A model with layers on several devices stays as it is.

    Args:
        kind: "eager"; "packed", linear layers laid out for few rows on a CPU (see `backends.packed`); "exact", linear
            layers and attention in which no row changes the result of another (on a CPU see `backends.layouts` and
            `backends.row_attention`, on a GPU `backends.kernels.rows`); "graph", forwards captured as CUDA graphs
            (`backends.graph`); "compile", forwards compiled by `torch.compile`, with packed layers on a CPU, and layer
            by layer and captured on a GPU (`backends.compiled`); "triton", as "graph", with kernels for few rows
            (`backends.kernels`); or "auto", the fastest for this model and device that needs no long preparation:
            packed on a CPU that gains from it, graph on a GPU, else eager.
        model: the model, on its device and in its type.
        agreed: returns the first process's value among processes that decode together, so that all take one layout.

    Raises:
        ValueError: as `check`, or there are layers on several devices.
        UnsupportedModelError: no kernel computes a module, and the backend is "exact" on a GPU.
    """
    device = next(model.parameters()).device
    check(kind, device)
    if (count := len({weight.device for weight in model.parameters()})) > 1:
        if kind not in ("auto", "eager"):
            raise ValueError(
                f"layers over {count} devices run on the backend eager only, and {kind!r} is asked for: leave it out"
            )
        return Backend(note=f"layers over {count} devices")
    on_gpu = device.type == "cuda"
    if kind == "compile":
        group(model)
        if on_gpu:
            return _compiled_by_layer(model, lambda: CudaGraphs(device))
        note = ""
        if packed.unsupported_reason(model) is None:
            note = f"packed: {_packed(model, _layout(model, packed.layouts(model), agreed), same_inputs(model))}"
        return Backend("compile", note, static=lambda forward: StaticRunner(compiled(forward)))
    if kind == "graph" or (kind == "auto" and on_gpu):
        group(model)
        return Backend("graph", static=lambda forward: StaticRunner(forward, CudaGraphs(device)), chosen=kind == "auto")
    if kind in _by_kernels(device):
        return _exact_by_kernels(model, device) if kind == "exact" else _triton(model, device)
    if kind == "eager":
        return Backend()
    if kind == "exact":
        by_rows(model)
        groups = same_inputs(model)
        note = _packed(model, _layout(model, packed.exact(model, groups), agreed), groups)
        return Backend("exact", note, exact=True)
    reason = packed.unsupported_reason(model)
    layout = PLAIN
    if reason is None:
        layout = _layout(model, [*([PLAIN] if kind == "auto" else []), *packed.layouts(model)], agreed)
        if layout is PLAIN:
            reason = "packing its linear layers gains nothing on this processor"
    if reason is not None:
        return Backend(note="" if kind == "auto" else f"not packed: {reason}")
    group(model)
    return Backend("packed", _packed(model, layout, same_inputs(model)))


def _compiled_by_layer(model: PreTrainedModel, capture: Callable[[], Capture]) -> Backend:
    """Compile a model's decoder layers, and capture its forwards. Draft heads, and a model without a list of layers,
    are compiled as a whole."""
    layers = decoder_layers(model)

    def whole(forward: StaticForward) -> StaticRunner:
        return StaticRunner(compiled(forward), capture())

    if layers is None:
        return Backend("compile", static=whole)
    if any(integer_weights(module) is not None for module in model.modules()):
        # Only here, as Triton may not be installed.
        from specdecode.backends.kernels.replace import replace_integer_layers

        replace_integer_layers(model)
    left = compile_layers(layers)
    note = f"{left} of {len(layers)} layers as they are" if left else ""
    return Backend("compile", note, static=lambda forward: StaticRunner(forward, capture()), static_head=whole)


def _triton(model: PreTrainedModel, device: torch.device) -> Backend:
    # Only here, as Triton may not be installed.
    from specdecode.backends.kernels import cache
    from specdecode.backends.kernels.attention import attend_over_slots, over_slots
    from specdecode.backends.kernels.replace import replace_layers

    switch_attention(model, BY_KERNEL, attend_over_slots)
    config = model.config.get_text_config(decoder=True)
    note = replace_layers(model)
    if config._attn_implementation != BY_KERNEL:
        note += f", attention as it is ({config._attn_implementation})"
    windowed = getattr(config, "sliding_window", None) is not None
    return Backend(
        "triton",
        note,
        static=lambda forward: _capturing(over_slots(forward, whole_mask=windowed), device),
        write=cache.write_to_slots,
        replace_layers=replace_layers,
    )


def _exact_by_kernels(model: PreTrainedModel, device: torch.device) -> Backend:
    from specdecode.backends.kernels import cache
    from specdecode.backends.kernels.replace import inexact_module, replace_layers
    from specdecode.backends.kernels.rows import attend_each_row

    switch_attention(model, BY_KERNEL_ROWS, attend_each_row)
    note = replace_layers(model, most_rows=None)
    if device.type == "cpu":  # under the interpreter, PyTorch runs the activations there
        separate_activations(model)
    if module := inexact_module(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run on the backend exact on a GPU: {module}, which no kernel computes"
        )
    return Backend(
        "exact",
        note,
        static=lambda forward: _capturing(forward, device),
        write=cache.write_to_slots,
        replace_layers=replace_layers,
        exact=True,
    )


def _capturing(forward: StaticForward, device: torch.device) -> StaticRunner:
    # The interpreter reads tensors on the host, which no graph captures. Shapes are rounded all the same.
    return StaticRunner(forward, (lambda action: action) if interpreted() else CudaGraphs(device))


def _layout(model: PreTrainedModel, candidates: Sequence[Layout], agreed: Callable[[Any], Any]) -> Layout:
    return LAYOUTS[agreed(packed.fastest(model, candidates).name)]


def _packed(model: PreTrainedModel, layout: Layout, groups: SameInputs) -> str:
    """Pack a model's linear layers, those of a group together, and return a note on it."""
    layers, left = packed.pack(model, layout, groups)
    return f"{layers} linear layers by {layout.name}" + (f", {left} other matrices as they are" if left else "")
