"""Forwards compiled by `torch.compile`: one version for one row, and one for any larger number of rows.

A forward is compiled as a whole, or decoder layer by decoder layer. As a whole, its code is compiled for each layer
anew. The code of one layer runs for all layers that are alike, so it is ready sooner. But each call of it checks in
Python whether it fits. On a CPU the checks of all layers take longer than compiling saves in a forward of one row. A
captured forward has no Python in it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdecode.backends.cache_views import LayerCacheView, StaticCacheView
from specdecode.backends.graph import CudaGraphs
from specdecode.backends.kernels import KernelModule, replace_modules
from specdecode.backends.static import StaticForward
from specdecode.backends.static_inputs import StaticInputs

# Target, draft and subsets of layers share the code of a forward, and all layers that of a layer. Each is compiled for
# one row and for several.
_RECOMPILE_LIMIT = 256


def preparations() -> int:
    """Return the number of forwards that were captured or compiled in this process so far. They take long, once."""
    # PyTorch imports its compiler at the first compilation, or earlier.
    compiler = sys.modules.get("torch._dynamo.utils")
    return CudaGraphs.count + (0 if compiler is None else compiler.counters["stats"]["unique_graphs"])


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
        if inputs.visible.shape[1] > 1:
            torch._dynamo.mark_dynamic(inputs.visible, 1)
        if len(inputs.tokens) > 1:
            torch._dynamo.mark_dynamic(inputs.tokens, 0)
            torch._dynamo.mark_dynamic(inputs.positions, 0)
            torch._dynamo.mark_dynamic(inputs.visible, 0)
            if inputs.states is not None:
                torch._dynamo.mark_dynamic(inputs.states, 0)
        outputs: tuple[Tensor, ...] = fast(inputs, positions, keys, values)
        return outputs

    return run


def compile_layers(layers: nn.ModuleList) -> int:
    """Let decoder layers run compiled code in forwards over static shapes, and their own code in all other forwards.

    The weights and the slots of a layer are inputs of the code. So layers of one class with weights of equal shapes and
    types share it, those of subsets of the layers and of other models too. The biases of linear layers are added apart.

    Returns:
        The number of layers that stay as they are: another library has wrapped them, or they have no index.
    """
    fast = _compiler(_forward)
    fitting = [layer for layer in layers if "forward" not in vars(layer) and _index(layer) is not None]
    for layer in fitting:
        add_biases_apart(layer)
        # In this form `models.wrapped.rebind` binds it to a copy of the layer.
        layer.forward = functools.partial(_run, layer, fast)
    return len(layers) - len(fitting)


class BiasApart(KernelModule):
    """A linear layer that, in compiled code, adds its bias to the product by an operation of its own.

    On a GPU the compiler makes the product of one row itself, and fuses it with what follows. It does not so with one
    to which a library adds the bias.

    Args:
        layer: a linear layer with a bias.
    """

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        output: Tensor
        if torch.compiler.is_compiling():
            output = nn.functional.linear(inputs, self.weight) + self.bias
        else:
            output = self.layer(inputs)
        return output


def add_biases_apart(module: nn.Module) -> None:
    """Replace the linear layers in a module that have a bias, in place."""

    def apart(child: nn.Module) -> BiasApart | None:
        fits = type(child) is nn.Linear and child.bias is not None and "forward" not in vars(child)
        return BiasApart(child) if fits else None

    replace_modules(module, apart)


_uncompiled: ContextVar[bool] = ContextVar("_uncompiled", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within this context, layers run their own code."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def _index(layer: nn.Module) -> int | None:
    """Return the index of a decoder layer, which its attention has; None if there is none, or several."""
    indices: set[Any] = {vars(module).get("layer_idx") for module in layer.modules()} - {None}
    return indices.pop() if len(indices) == 1 else None


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
    index = _index(layer)
    if cache is None or index is None or _uncompiled.get():
        return _forward(layer, *arguments, **named)
    # The compiler never sees the index: it would make code for each.
    view = cache.layer(index) if index in cache.layers else cache
    arguments = tuple(view if value is cache else value for value in arguments)
    named = {name: view if value is cache else value for name, value in named.items()}
    _mark_sizes((arguments, named), len(cache.places), len(cache.positions))
    return fast(layer, *arguments, **named)


def _mark_sizes(value: Any, rows: int, span: int) -> None:
    """Mark the sizes of a layer's arguments that grow, as `compiled` does: the rows, and the slots to attend to.

    Unlike there, it is no error if a layer turns out to need one size.
    """
    if isinstance(value, Tensor):
        # [rows], [1, rows], [1, rows, width], and masks [1, heads, rows, slots]. A width may equal the slots by chance:
        # with a mark on it, it would need code of its own.
        for dim in {1: [0], 2: [1], 3: [1], 4: [2, 3]}.get(value.dim(), []):
            if value.shape[dim] in (rows, span) and value.shape[dim] > 1:
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
    """Return a function that is compiled at its first call."""
    # With this option a GPU reads the weights of one row's product at nearly its full bandwidth. A CPU ignores it.
    fast: Callable[..., Any] = torch.compile(function, fullgraph=True, options={"coordinate_descent_tuning": True})

    def run(*arguments: Any, **named: Any) -> Any:
        if torch._dynamo.config.recompile_limit < _RECOMPILE_LIMIT:  # each thread has its own
            torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        # The compiler warns about its own code, which would raise where warnings are errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fast(*arguments, **named)

    return run
