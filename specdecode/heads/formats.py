"""Read and write the files of draft heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from specdecode.core.errors import ModelFileError
from specdecode.heads.module import Head, HeadShape, Signature

FORMAT = 1
"""Of the files of heads."""

_KEY = "specdecode-head"
# What the file names the tensors of a signature.
_TOKENS, _ROWS = "signature.tokens", "signature.rows"


def write_head(head: Head, signature: Signature, card: Mapping[str, Any]) -> bytes:
    """The bytes of a head's file: its weights in 16 bit, its shape, the signature of its target, and a card of plain
    values that says how it was trained."""
    held = {**head.state_dict(), _TOKENS: signature.tokens, _ROWS: signature.rows}
    known = {"target": signature.target, "vocab_size": signature.vocab_size, "layers": signature.layers}
    about = {"format": FORMAT, "shape": asdict(head.shape), "signature": known, "card": dict(card)}
    tensors = {name: value.half() if value.is_floating_point() else value.int() for name, value in held.items()}
    return save({name: value.contiguous() for name, value in tensors.items()}, {_KEY: json.dumps(about)})


def read_head(file: Path) -> tuple[Head, Signature, dict[str, Any]]:
    """A head in float32 on the CPU, the signature of its target, and its card.

    Raises:
        ModelFileError: the file is not there, is damaged, or holds no head of this version.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(_KEY, "null"))
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        if about is None or about["format"] != FORMAT:
            raise ModelFileError(f"{file} holds no draft head of this version: train one with `specdecode train-head`")
        shape = HeadShape(**{**about["shape"], "layers": tuple(about["shape"]["layers"])})
        weights = {name: value.float() if value.is_floating_point() else value.long() for name, value in held.items()}
        signature = Signature(**about["signature"], tokens=weights.pop(_TOKENS), rows=weights.pop(_ROWS))
        head = Head(shape, weights["tokens"])
        head.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"cannot read the draft head {file}: {first_line}") from error
    card: dict[str, Any] = about["card"]
    return head, signature, card
