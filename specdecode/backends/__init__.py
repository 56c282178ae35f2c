"""Backends run the forwards of a model: with transformers' own code, or closer to the hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specdecode.backends import packed
from specdecode.backends.compiled import compiled
from specdecode.backends.graph import CudaGraphs
from specdecode.backends.grouped_attention import group
from specdecode.backends.static import StaticForward, StaticRunner

BACKENDS = ("auto", "eager", "packed", "compile", "graph")


@dataclass(frozen=True, slots=True)
class Backend:
    """The way in which the forwards of one model run.

    Attributes:
        name: one of `BACKENDS`; "eager" is transformers' own code, unchanged.
        note: a sentence on the changes to the model, or the reason why there are none.
        static: builds the runner of a forward over static shapes; None for a backend without static shapes.
        chosen: whether "auto" chose this backend, so that "eager" may replace it.
    """

    name: str = "eager"
    note: str = ""
    static: Callable[[StaticForward], StaticRunner] | None = None
    chosen: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def check(kind: str, device: torch.device) -> None:
    """Raise ValueError for an unknown backend, or one that needs another device. Call it before loading a model."""
    if kind not in BACKENDS:
        raise ValueError(f"no backend is named {kind!r}: choose from {', '.join(BACKENDS)}")
    if kind == "graph" and device.type != "cuda":
        raise ValueError("the backend graph captures CUDA graphs, which need a GPU: use compile, packed or eager")


def prepare(kind: str, model: PreTrainedModel, agreed: Callable[[bool], bool] = bool) -> Backend:
    """Transform a model in place for a backend.

    With every backend but "eager", heads that share keys attend without copying them (see
    `backends.grouped_attention`).

    Args:
        kind: "eager"; "packed", linear layers laid out for few rows on a CPU (see `backends.packed`); "graph", forwards
            captured as CUDA graphs (`backends.graph`); "compile", forwards compiled by `torch.compile`, with packed
            layers on a CPU and captured on a GPU (`backends.compiled`); or "auto", the fastest for this model and
            device that needs no long preparation: packed on a CPU that gains from it, graph on a GPU, else eager.
        model: the model, on its device and in its type.
        agreed: combines the trial results of all processes that decode together into one decision.

    Raises:
        ValueError: as `check`.
    """
    device = next(model.parameters()).device
    check(kind, device)
    on_gpu = device.type == "cuda"
    if kind == "compile":
        group(model)
        if on_gpu:
            return Backend("compile", static=lambda forward: StaticRunner(compiled(forward), CudaGraphs()))
        note = f"{packed.pack(model)[0]} packed linear layers" if packed.unsupported_reason(model) is None else ""
        return Backend("compile", note, static=lambda forward: StaticRunner(compiled(forward)))
    if kind == "graph" or (kind == "auto" and on_gpu):
        group(model)
        return Backend("graph", static=lambda forward: StaticRunner(forward, CudaGraphs()), chosen=kind == "auto")
    if kind == "eager":
        return Backend()
    reason = packed.unsupported_reason(model)
    if reason is None and kind == "auto" and not agreed(packed.is_worth_it(model)):
        reason = "packing its linear layers gains nothing on this processor"
    if reason is not None:
        return Backend(note="" if kind == "auto" else f"not packed: {reason}")
    group(model)
    layers, left = packed.pack(model)
    return Backend("packed", f"{layers} linear layers" + (f", {left} other matrices as they are" if left else ""))
