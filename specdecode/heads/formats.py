"""Reading of head files in this package's own format, which earlier versions wrote. The heads are those of `module`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from specdecode.core.errors import ModelFileError, first_line
from specdecode.heads.module import Head, HeadShape, TargetFingerprint

FORMAT = 1
"""Version of the head file format."""

_KEY = "specdecode-head"
# Names of the fingerprint's tensors in the file.
_TOKENS, _ROWS = "signature.tokens", "signature.rows"


def read_head(file: Path) -> tuple[Head, TargetFingerprint, dict[str, Any]]:
    """Read a head file.

    Returns:
        The head in float32 on the CPU, the fingerprint of its target, and the record of its training (its card).

    Raises:
        ModelFileError: the file is missing or damaged, or holds no head of this format version.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(_KEY, "null"))
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        if metadata is None or metadata["format"] != FORMAT:
            raise ModelFileError(f"{file} holds no draft head of this version: train one with `specdecode train-head`")
        shape = HeadShape(**{**metadata["shape"], "layers": tuple(metadata["shape"]["layers"])})
        tensors = {name: value.float() if value.is_floating_point() else value.long() for name, value in stored.items()}
        rows = tensors.pop(_ROWS)
        fingerprint = TargetFingerprint(**metadata["signature"], tokens=tensors.pop(_TOKENS), rows=rows)
        head = Head(shape, tensors["tokens"])
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(f"cannot read the draft head {file}: {first_line(error)}") from error
    card: dict[str, Any] = metadata["card"]
    return head, fingerprint, card
