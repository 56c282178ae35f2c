"""Forwards through `torch.compile`: once for one row, once for more, whatever the number of rows and of slots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.backends.static import Inputs, Step

# Target, draft and subsets of layers share the code of a step, and each is compiled for one row and for more.
_COMPILATIONS = 64


def compiled(step: Step) -> Step:
    """A step that is compiled when it is first run, which takes from seconds to minutes; kernels are kept on disk by
    TorchInductor, so that later processes take less."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
    fast = torch.compile(step, fullgraph=True)

    def run(
        inputs: Inputs, positions: Int[Tensor, " span"], keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        # What grows is a number to the compiler from the start, so that it need not compile anew to find that out.
        torch._dynamo.mark_dynamic(positions, 0)
        for held in (*keys.values(), *values.values()):
            torch._dynamo.mark_dynamic(held, 2)
        if len(inputs.tokens) > 1:
            torch._dynamo.mark_dynamic(inputs.tokens, 0)
            torch._dynamo.mark_dynamic(inputs.positions, 0)
            torch._dynamo.mark_dynamic(inputs.visible, 0)
            torch._dynamo.mark_dynamic(inputs.visible, 1)
        # The compiler warns of its own doings, and fails where warnings are errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told: tuple[Tensor, ...] = fast(inputs, positions, keys, values)
        return told

    return run
