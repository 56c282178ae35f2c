"""Forwards compiled by `torch.compile`: one version for one row, and one for any larger number of rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.backends.static import StaticForward, StaticInputs

# Target, draft and subsets of layers share the code of a forward. Each is compiled for one row and for several.
_RECOMPILE_LIMIT = 64


def compiled(forward: StaticForward) -> StaticForward:
    """Return a forward that is compiled at its first run, which needs seconds to minutes. TorchInductor keeps kernels
    on disk, so later processes need less."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    fast = torch.compile(forward, fullgraph=True)

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
        # The compiler warns about its own code, which would raise where warnings are errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs: tuple[Tensor, ...] = fast(inputs, positions, keys, values)
        return outputs

    return run
