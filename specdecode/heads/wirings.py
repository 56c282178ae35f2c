"""The wirings that may fit a head's weights: the wiring of its config, and that wiring with one likely mistake
undone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdecode.core.errors import SpecDecodeError
from specdecode.heads.bound import target_sizes
from specdecode.heads.eagle3_files import (
    CONFIG,
    FLAGS,
    IDS,
    Eagle3Files,
    check_tokens,
    decoder_config,
    default_ids,
)
from specdecode.heads.fingerprint import target_fingerprint
from specdecode.models.lm import LM
from specdecode.models.variants import layer_configs

_DECODER = "transformer_layer_config"
# The rotary base of a config that gives none.
_DEFAULT_THETA = 10_000.0
# Keys that older files have in place of `rope_parameters`.
_OLDER_ROPE_KEYS = ("rope_theta", "rope_scaling")
_NORM_FLAGS = {"norm_before_fc": "input_norm.", "fc_norm": "fc_norm."}
"""Flags of norms before `fc`, each with the prefix of its tensors' names."""


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """A way to connect the weights of a head.

    Attributes:
        name: name of the wiring, for tables.
        remedy: the change in the head's folder that gives this wiring; "" for the wiring of the head's config.
        files: the weights, and a config of this wiring.
        final_norm: whether the output of the target's last layer is read after the target's final norm.
    """

    name: str
    remedy: str
    files: Eagle3Files
    final_norm: bool = False

    def layers(self, total: int) -> tuple[int, ...]:
        """Return the target's layers that the head reads. The number `total` stands for the output of the final norm.

        Args:
            total: number of the target's layers.
        """
        layers = self.files.layers(total)
        return tuple(total if self.final_norm and layer == total - 1 else layer for layer in layers)


def likely_wirings(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    """Yield the wiring of a head's config, and then wirings with one likely mistake undone.

    Some of them cannot be built from the weights, and some may be equal.

    Args:
        files: files of the head.
        target: target of the head.
    """
    stated = Wiring(f"as {CONFIG} says", "", _without_unread_norms(files))
    total, _ = target_sizes(target)
    for wiring in (stated, *_other_layers(stated.files, total)):
        yield wiring
        if total - 1 in wiring.files.layers(total):
            yield _after_final_norm(wiring)
    yield from _other_flags(files)
    yield from _other_tokens(stated.files)
    try:
        decoder_config(files)
    except (SpecDecodeError, KeyError, TypeError, ValueError):
        return  # the config's decoder layers cannot be built, so no variant of them can
    yield from _other_positions(stated.files, target)
    yield from _other_heads(stated.files, target)
    yield from _shared_embeddings(stated.files, target)


def _other_layers(files: Eagle3Files, total: int) -> Iterator[Wiring]:
    ids = [layer + 1 for layer in files.layers(total)]
    others = {
        "one lower": [number - 1 for number in ids],
        "one higher": [number + 1 for number in ids],
        "sorted": sorted(ids),
        "by default": default_ids(total),
    }
    for how, numbers in others.items():
        if 0 <= min(numbers) <= max(numbers) <= total:
            yield _changed(files, f"layer ids {how}: {', '.join(map(str, numbers))}", {IDS: numbers})


def _after_final_norm(wiring: Wiring) -> Wiring:
    first = f"{wiring.remedy}, and " if wiring.remedy else ""
    return replace(
        wiring,
        name=f"{wiring.name}, after the final norm" if wiring.remedy else "last layer after the final norm",
        remedy=f"{first}let the head read the target's last layer after its final norm ({CONFIG} has no key for this)",
        final_norm=True,
    )


def _other_flags(files: Eagle3Files) -> Iterator[Wiring]:
    stated = {flag: bool(files.config.get(flag)) for flag in FLAGS}
    norms_before_fc = [
        {"norm_before_fc": whole, "fc_norm": by_layer} for whole in (False, True) for by_layer in (False, True)
    ]
    others = [{flag: not stated[flag]} for flag in FLAGS if flag not in _NORM_FLAGS]
    for flags in (*others, *norms_before_fc):
        changed = {flag: value for flag, value in flags.items() if value != stated[flag]}
        if changed:
            name = ", ".join(f"{flag} {json.dumps(value)}" for flag, value in changed.items())
            wiring = _changed(files, name, changed)
            left_out = [_NORM_FLAGS[flag] for flag in changed if flag in _NORM_FLAGS and not changed[flag]]
            present = [name for name in files.tensors if name.startswith(tuple(left_out))]
            remedy = f"{wiring.remedy}, and remove {', '.join(present)} from the weights" if present else wiring.remedy
            yield replace(wiring, remedy=remedy, files=_without_unread_norms(wiring.files))


def _without_unread_norms(files: Eagle3Files) -> Eagle3Files:
    """Return the files of a head, without the norms before `fc` that its config does not use."""
    unread = tuple(prefix for flag, prefix in _NORM_FLAGS.items() if not files.config.get(flag))
    return replace(files, tensors={name: x for name, x in files.tensors.items() if not name.startswith(unread)})


def _other_tokens(files: Eagle3Files) -> Iterator[Wiring]:
    """Yield wirings with another reading of the maps between the two vocabularies."""
    # If the output embedding is the target's, other ids would give another vocabulary, which is no mistake.
    own_output = "lm_head.weight" in files.tensors
    differences = files.tensors.get("d2t")
    marked = files.tensors.get("t2d", torch.empty(0)).nonzero()[:, 0]
    others = []
    if differences is not None:
        remedy = "store in d2t the differences between the target's ids and the head's: it holds the ids themselves"
        others.append(("d2t holds ids", remedy, differences - torch.arange(len(differences))))
    if len(marked) == files.config.get("draft_vocab_size"):
        remedy = "store in d2t the differences between the ids that t2d marks, ascending, and the head's"
        others.append(("ids as t2d marks them", remedy, marked - torch.arange(len(marked))))
    for name, remedy, right in others:
        other = replace(files, tensors={**files.tensors, "d2t": right})
        if own_output or (_agree(other) and not _agree(files)):
            yield Wiring(name, remedy, other)
    if own_output and differences is not None:
        tensors = {name: x for name, x in files.tensors.items() if name not in ("d2t", "t2d")}
        yield Wiring("d2t ignored", "remove d2t and t2d from the weights", replace(files, tensors=tensors))


def _agree(files: Eagle3Files) -> bool:
    try:
        check_tokens(files)
    except (SpecDecodeError, RuntimeError):
        return False
    return True


def _other_positions(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    """Yield wirings with other rotary positions: the target's, and unscaled ones with the base of the target, of the
    config, or of configs by default."""
    stated = dict(decoder_config(files).rope_parameters or {})
    of_target = dict(getattr(target.config, "rope_parameters", None) or {})
    if "rope_type" not in of_target:
        of_target = dict(of_target.get("full_attention") or {})
    # Heads rotate all components of a key, even if the target rotates only some.
    of_target.pop("partial_rotary_factor", None)
    bases = [parameters.get("rope_theta") for parameters in (of_target, stated)]
    unscaled = [{"rope_type": "default", "rope_theta": base} for base in (*bases, _DEFAULT_THETA) if base]
    for parameters in (of_target, *unscaled):
        if parameters and parameters != stated:
            scaling = parameters["rope_type"]
            name = f"RoPE base {parameters['rope_theta']:g}" + (f", scaling {scaling}" if scaling != "default" else "")
            yield _decoder_changed(files, name, {"rope_parameters": parameters})


def _other_heads(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    """Yield a wiring with attention heads of the target's width, if the projections can be divided into such heads."""
    config = layer_configs(target.config)[-1]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = [len(files.tensors.get(f"layers.0.self_attn.{name}_proj.weight", ())) for name in "qk"]
    if width % 2 or not all(rows) or any(count % width for count in rows):
        return
    heads, kv_heads = (count // width for count in rows)
    if heads % kv_heads == 0:
        changes = {"head_dim": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        yield _decoder_changed(files, f"{heads} heads of width {width}, as the target's", changes)


def _shared_embeddings(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    embeddings = files.tensors.get("embed_tokens.weight")
    if embeddings is None:
        return
    known = target_fingerprint(target)
    rows = embeddings[known.tokens.clamp_max(len(embeddings) - 1)]
    if rows.shape == known.rows.shape and not torch.allclose(rows, known.rows, rtol=1e-2, atol=1e-3):
        tensors = {name: x for name, x in files.tensors.items() if name != "embed_tokens.weight"}
        remedy = "remove embed_tokens.weight from the weights"
        yield Wiring("the target's embeddings", remedy, replace(files, tensors=tensors))


def _changed(files: Eagle3Files, name: str, changes: Mapping[str, Any]) -> Wiring:
    remedy = " and ".join(f"{key} to {json.dumps(value, sort_keys=True)}" for key, value in changes.items())
    return Wiring(name, f"set {remedy} in {CONFIG}", files.rewired(**changes))


def _decoder_changed(files: Eagle3Files, name: str, changes: Mapping[str, Any]) -> Wiring:
    """Return the wiring with some changes in the config of the decoder layers."""
    decoder = {**files.config[_DECODER], **changes}
    older = [key for key in _OLDER_ROPE_KEYS if "rope_parameters" in changes and decoder.pop(key, None) is not None]
    wiring = _changed(files, name, changes)
    remedy = f"{wiring.remedy}, in place of {' and '.join(older)}" if older else wiring.remedy
    return replace(wiring, remedy=remedy, files=files.rewired(**{_DECODER: decoder}))
