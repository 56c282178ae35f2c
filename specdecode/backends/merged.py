"""Merged linear layers: those that a forward applies to the same inputs, computed by one product.

In a forward of one token each product waits for its weights, and for all threads to finish. Queries, keys and values
need one product in place of three; so do the two inputs of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

SameInputs = Mapping[nn.Module, Sequence[Sequence[str]]]
"""Groups of linear layers with the same inputs: for each module, the names of its layers in each group."""


class _Outputs:
    """The outputs of a product that its parts have not taken yet. Copies of a model share them.

    Attributes:
        inputs: the inputs of the product; None if all parts have taken their output.
        parts: the output of each part.
    """

    inputs: Tensor | None = None
    parts: Sequence[Tensor] = ()


class MergedPart(nn.Module):
    """One of several linear layers with the same inputs. The first part computes the outputs of all.

    A part that is called with other inputs than the first part computes the whole product for these.

    Attributes:
        product: the layer that computes the outputs of all parts, one behind the other.

    Args:
        product: as above.
        sizes: number of outputs of each part.
        part: number of this part, in the order in which a forward calls them, from 0.
        outputs: where the first part leaves the others' outputs.
    """

    def __init__(self, product: nn.Module, sizes: Sequence[int], part: int, outputs: _Outputs) -> None:
        super().__init__()
        self.product = product
        self._sizes, self._part, self._outputs = list(sizes), part, outputs

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        outputs = self._outputs
        if self._part == 0 or outputs.inputs is not inputs:
            outputs.inputs, outputs.parts = inputs, self.product(inputs).split(self._sizes, dim=-1)
        output = outputs.parts[self._part]
        if self._part == len(self._sizes) - 1:
            outputs.inputs, outputs.parts = None, ()  # the inputs and outputs need memory
        return output


def parts(product: nn.Module, layers: Sequence[nn.Linear]) -> list[MergedPart]:
    """Return the parts of a product, in place of these layers."""
    outputs, sizes = _Outputs(), [layer.out_features for layer in layers]
    return [MergedPart(product, sizes, part, outputs) for part in range(len(sizes))]


@torch.no_grad()
def joined_weight(layers: Sequence[nn.Linear]) -> Float[Tensor, "out in"]:
    """Return the weight of one layer that gives the outputs of several, one behind the other."""
    return layers[0].weight.detach() if len(layers) == 1 else torch.cat([layer.weight for layer in layers])


@torch.no_grad()
def joined_bias(layers: Sequence[nn.Linear]) -> nn.Parameter | None:
    """Return the bias of one layer that gives the outputs of several; None if they have none."""
    if len(layers) == 1 or layers[0].bias is None:
        return layers[0].bias
    return nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)


@torch.no_grad()
def same_inputs(model: nn.Module) -> SameInputs:
    """Return the groups of linear layers that a forward of one token applies to the same inputs, each once.

    The layers of a group belong to one module. All of them have a bias, or none has.
    """
    calls: dict[nn.Module, list[tuple[Tensor, int]]] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # The tensor is held, so that no other gets its place in memory. Its version changes if it is written to.
        calls.setdefault(layer, []).append((arguments[0], arguments[0]._version))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if type(layer) is nn.Linear]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    except Exception:
        return {}  # the probe of the model says why it fails
    finally:
        for hook in hooks:
            hook.remove()
    order = {layer: place for place, layer in enumerate(calls)}
    groups: dict[nn.Module, list[list[str]]] = {}
    for module in model.modules():
        once = [(name, layer) for name, layer in module.named_children() if len(calls.get(layer, ())) == 1]

        def key(named: tuple[str, nn.Module]) -> tuple[int, int, bool]:
            inputs, version = calls[named[1]][0]
            return id(inputs), version, named[1].bias is not None

        for _, group in groupby(sorted(once, key=key), key):
            names = [name for name, _ in sorted(group, key=lambda named: order[named[1]])]
            if len(names) > 1:
                groups.setdefault(module, []).append(names)
    return groups
