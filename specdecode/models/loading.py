"""Loading of an LM by name: a hub id, a local folder, the embedded model, or an architecture with random weights."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdecode.backends import Backend, prepare
from specdecode.backends import check as check_backend
from specdecode.core.errors import ModelFileError, TokenizerMismatchError, first_line
from specdecode.core.ranks import Ranks
from specdecode.models.architectures import config_of
from specdecode.models.chat import TextEncoder
from specdecode.models.devices import DeviceMap, input_device, place
from specdecode.models.embedded import EMBEDDED, fetch
from specdecode.models.lm import LM
from specdecode.models.quantize import quantizer
from specdecode.models.tensor_parallel import arguments, split, split_count
from specdecode.support.messages import hub_noted

# Standard deviation of the embedding's entries. Each layer adds about 1 to the hidden states.
_EMBEDDING_SCALE = 10.0
# Logit of a token's successor. The distribution stays flat, so trees grow wide.
_LOGIT = 8.0

TINY = "shape:tiny"
"""The smallest model, with random weights, to try out a measurement."""


def load(
    name: str = EMBEDDED,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    target: LM | None = None,
    same_vocabulary: bool = True,
    quantize: str | None = None,
    backend: str = "auto",
    tp: str | None = None,
    device_map: DeviceMap | None = None,
) -> LM:
    """Load a causal language model.

    Args:
        name: a local folder, or a hub id such as "EleutherAI/pythia-2.8b". "smollm2-135m" is the embedded default
            model, which is fetched once. "shape:NAME" is an architecture with seeded random weights, to measure costs.
            "layers:0-9,29" is a draft with these layers of `target`.
        dtype: "float32", "float16", "bfloat16" or "float64". The default is float32 on a CPU and float16 elsewhere.
        device: a PyTorch device. The default is the first GPU, or the CPU if there is no GPU.
        target: the model that this one drafts for. Their vocabularies are compared.
        same_vocabulary: False skips the comparison, for a draft with another vocabulary (`UniversalDrafter`).
        quantize: "int8" or "int4" stores the weights of linear layers in 8 or 4 bits (see `models.quantize`). 4 bits
            are for a CPU.
        backend: the way in which forwards run: "eager", "packed", "exact", "graph", "compile", "triton", or "auto" for
            the fastest backend that needs no long preparation (see `specdecode.backends`). `LM.backend` names it. A
            "layers:" draft has the type, the device and the backend of its target.
        tp: "auto" splits each weight among the processes of `torchrun` (tensor parallelism). Then every process must
            make the same calls. Each process holds a whole draft.
        device_map: "auto" spreads whole layers over all GPUs of this process. A dict gives the device of each module by
            its name, as in transformers. The layers run one after the other, on the backend "eager".

    Returns:
        The model, which has passed the check of exact decoding.

    Raises:
        ModelFileError: there is no model of that name, or its files are damaged, or cannot be fetched or stored.
        UnsupportedModelError: the architecture cannot be decoded exactly, quantised or split.
        TokenizerMismatchError: the model does not share the vocabulary of `target`.
        ValueError: an argument is unknown, needs a package that is not installed, or is not possible with split weights
            or with layers on several devices. Or `tp` was given without `torchrun`, or "layers:" without `target`.
    """
    count = split_count(tp, name, quantize, backend)
    chosen_device = input_device(device, device_map, name, tp, backend)
    transform = quantizer(quantize, chosen_device) if quantize else None
    chosen_dtype = choose_dtype(dtype, chosen_device)
    check_backend(backend, chosen_device)
    if name.startswith("layers:"):
        if quantize:
            raise ValueError(
                f"{name!r} shares the weights of its target, as they are: quantize the target, or leave out"
                f" quantize={quantize!r}"
            )
        return _layers(name, target)
    tokenizer: PreTrainedTokenizerBase | None = None
    if name.startswith("shape:"):
        model = split(_random(name, chosen_dtype, torch.device("cpu") if device_map else chosen_device), count)
    else:
        source = source_of(name)
        with _noted(name, source):
            model = _pretrained(name, source, chosen_dtype, count)
            tokenizer = _tokenizer(source)
        if chosen_device.type == "cpu":
            _into_memory(model)
    if transform:
        transform(model)
    if count == 1:
        # After the transform, so that only the quantised weights must fit on the device.
        place(model, chosen_device, device_map)
    ranks = Ranks() if target is None else target.ranks
    lm = LM.on_backend(
        Backend(note=f"split among {count} processes") if count > 1 else prepare(backend, model, ranks.agreed),
        model,
        tokenizer,
        name=f"{name} ({quantize})" if quantize else name,
        synthetic=name.startswith("shape:"),
    )
    if target is not None and same_vocabulary:
        check_vocabulary(target, lm)
    return lm


def load_encoder(name: str) -> TextEncoder:
    """Load only the tokenizer of a model. If there is no tokenizer of that name, prompts are encoded as bytes.

    Args:
        name: as for `load`.

    Raises:
        ModelFileError: there is no such folder, the tokenizer is damaged, or the embedded model cannot be fetched.
    """
    if name.startswith("shape:"):
        return TextEncoder(name, vocab_size=config_of(name.removeprefix("shape:")).get_text_config().vocab_size)
    source = source_of(name)
    with _noted(name, source):
        return TextEncoder(name, _tokenizer(source))


def source_of(name: str) -> str:
    """Return the location of a model's files: a local path that exists, or an id on the hub.

    Raises:
        ModelFileError: there is no such folder, or the embedded model cannot be fetched.
    """
    if name == EMBEDDED:
        return str(fetch())
    if is_missing(name):
        raise ModelFileError(f"no such folder: {name}")
    # Not a `Path`, which would turn "./gpt2" into the hub's "gpt2".
    return os.path.expanduser(name)


def is_missing(name: str) -> bool:
    """Return whether a name is a local path, no id of the hub, and nothing is there."""
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return local and not os.path.exists(os.path.expanduser(name))


def _layers(name: str, target: LM | None) -> LM:
    """Return the subset of a target's layers for a name such as "layers:0-9,29"."""
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
    """Raise TokenizerMismatchError unless each token id stands for the same text in both models.

    The sizes of the vocabularies may differ if the tokenizers agree: a vocabulary may be padded to a round size.
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
        return  # a tokenizer has several texts for one id, but all ids agree
    raise TokenizerMismatchError(
        f"{draft.name} does not share the vocabulary of {target.name}: token {first} is"
        f" {text_of_draft.get(first)!r} there and {text_of.get(first)!r} here; choose a draft of the target's family,"
        " or let this one draft by text (UniversalDrafter, --drafter universal)"
    )


def _random(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = config_of(name.removeprefix("shape:"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _make_decisive(model)
    return model


@torch.no_grad()
def _make_decisive(model: PreTrainedModel) -> None:
    """Change random weights so that each token has a clearly most probable successor: its id plus `hidden_size`.

    With plain random weights the two largest logits often differ by less than the rounding of 16 bits, so outputs
    differ at ties. Here the embedding is scaled to outweigh the sum of all layers, and the output embedding is made to
    select the successor. Shapes do not change, and so costs do not change. A model with tied embeddings repeats a
    token.
    """
    embedding: Any = model.get_input_embeddings().weight
    output: Any = model.get_output_embeddings().weight
    embedding.mul_(_EMBEDDING_SCALE / embedding.float().std())
    if output is not embedding:
        hidden = embedding.shape[1]
        # The successor's logit is then near `_LOGIT`, as the last norm gives the states unit variance.
        output.copy_(embedding.roll(hidden, 0) * (_LOGIT / (hidden * _EMBEDDING_SCALE)))


def _noted(name: str, source: str) -> AbstractContextManager[None]:
    """Return the context in which a model's files are read. It writes a note if the hub is asked, and is slow."""
    return nullcontext() if Path(source).is_dir() else hub_noted(name)


def _pretrained(name: str, source: str, dtype: torch.dtype, count: int = 1) -> PreTrainedModel:
    if os.path.isfile(source):
        raise ModelFileError(f"{name} is a file: give the folder of a model")
    options = {"dtype": dtype, "output_loading_info": True, **arguments(count, source)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
        model, report = loaded
        # transformers would leave these weights random, with only a warning.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    except Exception as error:
        origin = "the files there" if Path(source).is_dir() else "it is no local folder, and the hub"
        raise ModelFileError(f"cannot load {name!r}: {origin} gave no model ({first_line(error)})") from error
    pretrained: PreTrainedModel = model
    return pretrained


def _into_memory(model: PreTrainedModel) -> None:
    """Copy the weights from their mapped file into memory. Reading a mapped file may need up to half as much time
    again, depending on the system's file cache, so times could not be compared."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def _tokenizer(source: str) -> Any:
    """Return the tokenizer, or None if the model's folder has none, since decoding needs only ids.

    Raises:
        ModelFileError: there is a tokenizer, but it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if type(tokenizer).__name__ != "MistralCommonBackend":
            return tokenizer
        # That one has no names of tokens, and shows no chat template. With this option transformers reads
        # tokenizer.json, and mends a fault that some of these files have.
        tokenizer = AutoTokenizer.from_pretrained(source, fix_mistral_regex=True)
        if not _holds(source, "tokenizer.json"):
            raise ValueError("mistral-common reads its tekken.json, but names no tokens: add its tokenizer.json")
        return tokenizer
    except Exception as error:  # a damaged file, or a package that is not installed: each is another error
        if not any(_holds(source, name) for name in _TOKENIZER_FILES):
            return None
        raise ModelFileError(f"cannot load the tokenizer of {source}: {first_line(error)}") from error


def _holds(source: str, name: str) -> bool:
    """Return whether a folder has a file, or the hub's cache has it, for a model of the hub."""
    if Path(source).is_dir():
        return (Path(source) / name).exists()
    with suppress(ValueError):  # no id of the hub
        return isinstance(try_to_load_from_cache(source, name), str)
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the given type, or the default type of the device for None. Raise ValueError for an unknown name."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    names = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    chosen = names.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"dtype {str(dtype)!r} is not one of {', '.join(names)}")
    return chosen
