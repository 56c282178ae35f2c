"""The probe of a model: a tree forward through the slots must give the logits of sequential forwards without slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from specdecode.core.errors import UnsupportedModelError, first_line
from specdecode.core.tree import DraftTree
from specdecode.models.checks import inexact_reason, missing_arguments, mixed_rows_reason
from specdecode.models.forwards import SlotDecoder
from specdecode.models.masks import MaskForm
from specdecode.models.quantized_linear import rounding
from specdecode.models.wrapped import execution_device

# Width of the sliding window during the probe, in positions. It is less than the length of the probe.
_PROBE_WINDOW = 4
# Paths of the probe's tree that are read in sequence. The last of them is also accepted.
_PATHS = ([3], [8, 10], [8, 9, 11])
# Largest error of a tree forward, in standard deviations of the logits. It is far above rounding, and far below the
# error of a wrong mask or position. The bound for float64 is loose, since parts of a model may compute in float32.
_LAST_UNITS = 2  # or so many units in the last place, where those are as large
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.25}


def exact_mask_form(form: MaskForm, config: PretrainedConfig, check: Callable[[MaskForm], None]) -> MaskForm:
    """Return the form of masks with which a model with a sliding window decodes exactly.

    The two forms are one mask for each type of layers, and one mask for all layers.

    Args:
        form: the form to try first.
        config: the model's configuration. Its window is narrowed during the check: only a window below the length of
            the probe shows how the model's code uses it.
        check: raises UnsupportedModelError unless the model decodes exactly with the given form.

    Raises:
        UnsupportedModelError: the model decodes exactly with neither form.
    """
    with _narrow_window(config) as window:
        try:
            check(replace(form, window=window))
        except UnsupportedModelError:
            form = replace(form, by_layer_type=False)
            check(replace(form, window=window))
    return form


@contextmanager
def _narrow_window(config: PretrainedConfig) -> Iterator[int]:
    """Narrow the sliding window of a configuration within this context, and yield the narrow width in positions."""
    window = config.sliding_window
    config.sliding_window = narrow = min(window, _PROBE_WINDOW)
    try:
        yield narrow
    finally:
        config.sliding_window = window


@torch.inference_mode()
def check_tree_decoding(decoder: SlotDecoder) -> None:
    """Compare a short tree forward through the slots with sequential forwards without slots.

    Raises:
        UnsupportedModelError: the logits differ, or a forward fails. The message gives the reason.
    """
    try:
        reason = _difference(decoder)
        cause: Exception | None = None
    except torch.OutOfMemoryError:
        raise
    except UnsupportedModelError as error:
        reason, cause = str(error), error
    except Exception as error:
        reason = (
            "its forward does not take a 4-D mask, positions and a cache of keys and values"
            f" ({type(error).__name__}: {first_line(error)})"
        )
        cause = error
    if reason is not None:
        reason = missing_arguments(decoder.model) or mixed_rows_reason(decoder.model) or reason
        raise UnsupportedModelError(f"{decoder.name} cannot be decoded exactly: {reason}") from cause


@torch.inference_mode()
def check_rows(decoder: SlotDecoder) -> None:
    """Compare a tree forward with forwards of single tokens, to the last bit.

    Raises:
        UnsupportedModelError: a logit differs, or may differ in other forwards. The message gives the reason.
    """
    if reason := inexact_reason(decoder.model) or _row_difference(decoder):
        raise UnsupportedModelError(f"{decoder.name} cannot run on the backend exact: {reason}")


def _row_difference(decoder: SlotDecoder) -> str | None:
    """Return a message if the logits of a tree differ from those of single tokens; None if they are the same."""
    stem, tree = _stem(decoder.vocab_size), _tree(decoder.vocab_size)
    slots = decoder.new_slots(len(stem))
    decoder.forward(slots, torch.tensor(stem[:-1]))
    at_nodes = decoder.forward_tree(slots, stem[-1:], tree)
    for path in _PATHS:
        slots = decoder.new_slots(len(stem))
        decoder.forward(slots, torch.tensor(stem[:-1]))
        for node in (0, *path):
            token = stem[-1] if node == 0 else int(tree.tokens[node - 1])
            if not torch.equal(decoder.forward(slots, torch.tensor([token]))[0], at_nodes[node]):
                return "beside other tokens, a token's logits differ in their last bits; use another backend"
    return None


def _stem(vocab_size: int) -> list[int]:
    return [(11 * i + 3) % vocab_size for i in range(5)]


def _tree(vocab_size: int) -> DraftTree:
    # Eight siblings, so that slot and position differ much in the branch below the last sibling.
    return DraftTree(torch.tensor([(7 * i + 5) % vocab_size for i in range(11)]), torch.tensor([0] * 8 + [8, 8, 9]))


def _difference(decoder: SlotDecoder) -> str | None:
    """Return a message if the logits through the slots differ from the sequential logits; None if they agree."""
    model, vocab_size = decoder.model, decoder.vocab_size
    stem, tree, after = _stem(vocab_size), _tree(vocab_size), vocab_size // 2
    accepted = _PATHS[-1]
    slots = decoder.new_slots(len(stem))
    # On a backend with static shapes, the first forward is an ordinary one, and the others are static.
    decoder.forward(slots, torch.tensor(stem[:-1]))
    at_nodes = decoder.forward_tree(slots, stem[-1:], tree)
    slots.keep([len(stem) - 1 + node for node in accepted], after=len(stem))
    at_end = decoder.forward(slots, torch.tensor([after]))
    for path in _PATHS:
        text = stem + [int(tree.tokens[i - 1]) for i in path] + [after]
        sequential = model(torch.tensor([text], device=execution_device(model)), use_cache=False).logits[0]
        through_slots = torch.cat([at_nodes[[0, *path]], at_end if path is accepted else at_end[:0]])
        sequential = sequential[len(stem) - 1 :][: len(through_slots)].double()
        if not sequential.isfinite().all():
            return (
                "a plain forward gives logits that are NaN or infinite: its weights are damaged, or too large for"
                f" {str(model.dtype).removeprefix('torch.')}; load it again, or in another dtype"
            )
        error = ((through_slots.double() - sequential).abs().max() / sequential.std()).item()
        unit = torch.finfo(through_slots.dtype).eps * sequential.abs().max().item() / sequential.std().item()
        if not error <= max(_TOLERANCE[rounding(model)], _LAST_UNITS * unit):
            return (
                "a tree through its cache gives other logits than the same tokens in sequence (off by"
                f" {error:.2g} standard deviations), as happens where positions are taken from cache slots"
                " (ALiBi), a layer ignores the given mask, or the code does not follow the configuration"
            )
    return None
