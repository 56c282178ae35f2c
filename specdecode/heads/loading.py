"""Loading of a draft head by name: a folder, a hub id, or a model with a head in this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from specdecode.core.errors import ModelFileError, first_line
from specdecode.heads.bound import BoundHead, target_sizes
from specdecode.heads.eagle3_files import CONFIG, Eagle3Files, check_tokens, make_eagle3, read_eagle3
from specdecode.heads.fingerprint import ADVICE, check_fingerprint
from specdecode.heads.mtp import MtpHead
from specdecode.models.lm import LM
from specdecode.models.loading import is_missing
from specdecode.support.messages import hub_noted

_FILES = ["*.json", "*.safetensors", "pytorch_model.bin"]
_NAME_IT = f"name the folder of a head, or {ADVICE}"


def shipped_head(name: str) -> Path | None:
    """Return the folder of the head that this package contains for a model of this name; None if there is none."""
    if Path(name).name != name:  # a path
        return None
    folder = Path(__file__).parents[1] / "assets" / f"{name}-head"
    return folder if folder.exists() else None


def load_head(name: str, target: LM) -> BoundHead:
    """Load a trained head and bind it to its target.

    Args:
        name: a folder with an EAGLE-3 head, in the format of `speculators` or as the original files, or the id of such
            a folder on the hub. Or the name of a model with a head in this package, such as "smollm2-135m";
            "./smollm2-135m" is a folder.
        target: the model that the head was trained for, in any type.

    Returns:
        The head for `HeadDrafter`, in the target's type and on its device.

    Raises:
        ModelFileError: there is no head of that name, or its files are damaged.
        UnsupportedModelError: the head was trained for another target, or its architecture cannot be read.
    """
    files = head_files(name)
    if files.fingerprint is not None:
        check_fingerprint(files.folder, files.fingerprint, target)
    head = make_eagle3(files, *target_sizes(target))
    check_tokens(files)
    return BoundHead(head.to(target.device, target.dtype), target, copied=False)


def head_files(name: str) -> Eagle3Files:
    """Read the folder of a head, even if its config does not fit its weights.

    Args:
        name: as for `load_head`.

    Raises:
        ModelFileError: there is no head of that name, or its files are damaged.
    """
    return read_eagle3(find_folder(str(shipped_head(name) or name)))


def load_mtp(target: LM) -> BoundHead:
    """Load the MTP layer of a target's checkpoint, and bind it to the target (multi-token prediction, DeepSeek-V3,
    2024).

    Args:
        target: a model whose checkpoint has MTP layers.

    Returns:
        The MTP layer as a head for `HeadDrafter`.

    Raises:
        UnsupportedModelError: the target has no MTP layers, or this version of transformers cannot load them.
        ModelFileError: the weights of the MTP layers are missing or damaged.
    """
    return BoundHead(MtpHead(target.model), target, copied=False)


def find_folder(name: str, files: Sequence[str] = _FILES, advice: str = _NAME_IT) -> Path:
    """Return the folder of a head: a local folder, or a download from the hub.

    Args:
        name: a folder, or an id on the hub.
        files: patterns of the files to download.
        advice: ways out, for the message.

    Raises:
        ModelFileError: the name is neither a folder of a head, nor an id on the hub that can be fetched.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    if folder.exists() or is_missing(name) or "/" not in name:
        lacks = f"{folder} holds no {CONFIG}" if folder.exists() else f"there is no draft head {name!r}"
        raise ModelFileError(f"{lacks}: {advice}")
    try:
        with hub_noted(name):
            return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # no network, no such repository, or a gated one: each is another error
        raise ModelFileError(
            f"no draft head {name!r}: no folder of that name, and the hub said: {first_line(error)}"
        ) from error
