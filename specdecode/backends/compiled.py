"""Forwards compiled by `torch.compile`: one version for one row, and one for any larger number of rows.

A forward is compiled as a whole, or decoder layer by decoder layer. As a whole, its code is compiled for each layer
anew. The code of one layer runs for all layers that are alike, so it is ready sooner. But each call of it checks in
Python whether it fits. On a CPU the checks of all layers take longer than compiling saves in a forward of one row. A
captured forward has no Python in it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from specdecode.backends.cache_views import LayerCacheView, StaticCacheView
from specdecode.backends.static import StaticForward, StaticInputs

# Target, draft and subsets of layers share the code of a forward, and all layers that of a layer. Each is compiled for
# one row and for several.
_RECOMPILE_LIMIT = 256


def compiled(forward: StaticForward) -> StaticForward:
    """Return a forward that is compiled at its first run, which needs seconds to minutes. TorchInductor keeps kernels
    on disk, so later processes need less."""
    fast = _compiler(forward)

    def run(
        inputs: StaticInputs, positions: Int[Tensor, " span"], keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        # Growing sizes are marked as dynamic from the start. Otherwise the compiler notices it only in a recompilation.
        torch._dynamo.mark_dynamic(positions, 0)
        for tensor in (*keys.values(), *values.values()):
            torch._dynamo.mark_dynamic(tensor, 2)
        if len(inputs.tokens) > 1:
            torch._dynamo.mark_dynamic(inputs.tokens, 0)
            torch._dynamo.mark_dynamic(inputs.positions, 0)
            torch._dynamo.mark_dynamic(inputs.visible, 0)
            torch._dynamo.mark_dynamic(inputs.visible, 1)
            if inputs.states is not None:
                torch._dynamo.mark_dynamic(inputs.states, 0)
        with _without_warnings():
            outputs: tuple[Tensor, ...] = fast(inputs, positions, keys, values)
        return outputs

    return run


def compile_layers(layers: nn.ModuleList) -> None:
    """Let decoder layers run compiled code in forwards over static shapes, and their own code in all other forwards.

    The weights and the slots of a layer are inputs of the code. So layers that are alike share it, those of subsets of
    the layers and of other models too. A layer that another library has wrapped stays as it is.
    """
    fast = _compiler(_forward)
    for layer in layers:
        if "forward" not in vars(layer):
            # In this form `models.wrapped.rebind` binds it to a copy of the layer.
            layer.forward = functools.partial(_run, layer, fast)


def _forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *arguments, **named)


def _run(layer: nn.Module, fast: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run a decoder layer.

    Args:
        layer: the layer.
        fast: the compiled `_forward`.
        arguments, named: the arguments of the layer.
    """
    cache = next((value for value in (*arguments, *named.values()) if isinstance(value, StaticCacheView)), None)
    if cache is None:
        return _forward(layer, *arguments, **named)
    indices: set[Any] = {vars(module).get("layer_idx") for module in layer.modules()} - {None}
    if len(indices) != 1:
        return _forward(layer, *arguments, **named)
    # The compiler never sees the index: it would make code for each.
    (index,) = indices
    view = cache.layer(index) if index in cache.layers else cache
    arguments = tuple(view if value is cache else value for value in arguments)
    named = {name: view if value is cache else value for name, value in named.items()}
    _mark_sizes((arguments, named), len(cache.places), len(cache.positions))
    with _without_warnings():
        return fast(layer, *arguments, **named)


def _mark_sizes(value: Any, rows: int, span: int) -> None:
    """Mark the sizes of a layer's arguments that grow, as `compiled` does: the rows, and the slots to attend to.

    Unlike there, it is no error if a layer turns out to need one size: the last dimension may be as large by chance.
    """
    if isinstance(value, Tensor):
        # [..., rows, width], [..., slots, width], [..., rows, slots], or [..., rows] of one or two dimensions
        last = value.dim() - 1
        dims = [last - 1] if last > 1 else [last]
        if tuple(value.shape[-2:]) == (rows, span):
            dims = [last - 1, last]
        for dim in dims:
            if value.dim() and value.shape[dim] in (rows, span) and value.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(value, dim)
    elif isinstance(value, LayerCacheView):
        for slots in (value.keys, value.values):
            torch._dynamo.maybe_mark_dynamic(slots, 2)
        _mark_sizes((value.places, value.positions), rows, span)
    elif isinstance(value, Mapping):
        _mark_sizes(tuple(value.values()), rows, span)
    elif isinstance(value, tuple | list):
        for part in value:
            _mark_sizes(part, rows, span)


def _compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    fast: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return fast


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide the warnings of the compiler about its own code, which would raise where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
