"""The doctor of draft heads: it names the wiring that a head was trained with, and leaves a right one alone."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from specdecode import LM, load
from specdecode.cli import doctor as command
from specdecode.evals.data import token_prompts
from specdecode.heads.bound import head_shape, output_rows, target_fingerprint, untrained
from specdecode.heads.doctor import Diagnosis, examine
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import IDS, Eagle3Files, read_eagle3, write_eagle3
from specdecode.models.recording import recorded_hidden_states
from specdecode.models.variants import final_norm
from specdecode.training.loss import predict_ahead
from specdecode.training.shards import Shard
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.models import ARCHITECTURES, build, continuation

TEXTS, PROMPT, LENGTH, STEPS = 8, 10, 28, 100

# A base of rotary positions that turns them much faster than the usual one, so that it matters in short texts.
BASE = {"rope_type": "default", "rope_theta": 50.0}


@functools.cache
def target(name: str = "llama") -> LM:
    model = build(ARCHITECTURES[name] | ({} if name == "gpt-neox" else {"rope_parameters": BASE}))
    norm = final_norm(model)
    assert norm is not None
    # One that changes what it reads, as that of a trained model does.
    norm.weight.data.uniform_(0.2, 3.0, generator=torch.Generator().manual_seed(1))
    return LM(model, name=name)


@functools.cache
def texts(name: str = "llama") -> list[tuple[list[int], list[int]]]:
    mixer = torch.Generator().manual_seed(0)
    prompts = [torch.randint(97, (PROMPT,), generator=mixer).tolist() for _ in range(TEXTS)]
    return [(prompt, continuation(target(name).model, prompt, LENGTH)) for prompt in prompts]


def trained(name: str = "llama", *, ids: tuple[int, ...], normed: bool = False, **wiring: Any) -> Eagle3Head:
    """A head that knows the target's texts, trained with this wiring."""
    model, written = target(name), texts(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = replace(head_shape(model, [number - 1 for number in ids]), **({"fc_norm": False} | wiring))
        head = Eagle3Head(shape, torch.tensor(sorted({token for _, text in written for token in text}))).double()
        # Norms that change what they read, so that one which is left out shows.
        for weight in head.parameters():
            if weight.dim() == 1:
                weight.data.uniform_(0.2, 3.0)
    tokens = torch.tensor([[*prompt, *text] for prompt, text in written])
    with recorded_hidden_states(model.model, shape.layers) as by_layer, torch.no_grad():
        best = model.model(tokens, use_cache=False).logits.argmax(-1)
        states = list(by_layer)
        if normed:
            states[-1] = final_norm(model.model)(states[-1])
    place = torch.full((model.vocab_size,), -1)
    place[head.tokens] = torch.arange(len(head.tokens))
    batch = Shard(tokens, torch.cat(states, -1), best[..., None], torch.ones(*best.shape, 1))
    embedding, rows = model.model.get_input_embeddings(), output_rows(model, head.tokens)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(STEPS):
        _, losses, _ = predict_ahead(head, embedding, rows, place, batch, 3)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return head


@functools.cache
def files(name: str = "llama", **wiring: Any) -> Eagle3Files:
    """The files of a trained head, made once."""
    head, model = trained(name, **wiring), target(name)
    rows, fingerprint = output_rows(model, head.tokens), target_fingerprint(model)
    with TemporaryDirectory() as folder:
        write_eagle3(Path(folder), head, rows, fingerprint, ["Model"], {}, "")
        return read_eagle3(Path(folder))


FIRST = {"ids": (1, 2, 3), "norm_before_residual": True, "fc_norm": True}
SECOND = {"ids": (2, 2, 1), "norm_output": True, "norm_before_fc": True}
PLAIN = {"ids": (1, 2, 3)}
NORMED = {"ids": (1, 3, 4), "normed": True}


def changed(files: Eagle3Files, **tensors: Tensor) -> Eagle3Files:
    return replace(files, tensors={**files.tensors, **{name.replace("__", "."): x for name, x in tensors.items()}})


def decoder(files: Eagle3Files, **changes: Any) -> Eagle3Files:
    return files.rewired(transformer_layer_config={**files.config["transformer_layer_config"], **changes})


def scrambled(files: Eagle3Files) -> Tensor:
    mixer = torch.Generator().manual_seed(3)
    return torch.randn(97, 32, dtype=torch.float32, generator=mixer)


MUTATIONS: dict[str, tuple[dict[str, Any], Callable[[Eagle3Files], Eagle3Files], str]] = {
    "ids shifted": (FIRST, lambda f: f.rewired(**{IDS: [2, 3, 4]}), "auxiliary ids one lower"),
    "ids shifted down": (
        FIRST,
        lambda f: f.rewired(**{IDS: [0, 1, 2]}),
        "auxiliary ids one higher",
    ),
    "ids unsorted": (FIRST, lambda f: f.rewired(**{IDS: [3, 1, 2]}), "auxiliary ids sorted"),
    "ids not default": (SECOND, lambda f: f.rewired(**{IDS: [4, 1, 3]}), "auxiliary ids the default ones"),
    "residual": (FIRST, lambda f: f.rewired(norm_before_residual=False), "norm_before_residual on"),
    "no residual": (PLAIN, lambda f: f.rewired(norm_before_residual=True), "norm_before_residual off"),
    "output": (SECOND, lambda f: f.rewired(norm_output=False), "norm_output on"),
    "no output": (PLAIN, lambda f: f.rewired(norm_output=True), "norm_output off"),
    "fc_norm": (FIRST, lambda f: f.rewired(fc_norm=False), "fc_norm on"),
    "before fc": (SECOND, lambda f: f.rewired(norm_before_fc=False), "norm_before_fc on"),
    "no fc_norm": (SECOND, lambda f: f.rewired(fc_norm=True), "fc_norm off"),
    "d2t as ids": (FIRST, lambda f: changed(f, d2t=f.tokens), "d2t as ids"),
    "d2t lost": (FIRST, lambda f: changed(f, d2t=f.tensors["d2t"] * 0), "d2t from t2d"),
    "rotary": (
        FIRST,
        lambda f: decoder(f, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "the target's rotary",
    ),
    "head_dim": (
        FIRST,
        lambda f: decoder(f, head_dim=16, num_attention_heads=2, num_key_value_heads=1),
        "the target's head_dim",
    ),
    "embeddings": (FIRST, lambda f: changed(f, embed_tokens__weight=scrambled(f)), "the target's embeddings"),
    "final norm": (NORMED, lambda f: f, "hidden state 4 after the final norm"),
}


def diagnosed(files: Eagle3Files, name: str = "llama") -> Diagnosis:
    return examine(files, target(name), texts(name))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_miswiring_is_named(mutation: str, unchecked: None) -> None:
    """Guards against a field whose fault is not looked for, and one that is taken for another."""
    wiring, mutate, expected = MUTATIONS[mutation]
    right = files(**wiring)
    found = diagnosed(mutate(right))
    assert found.better is not None, [(each.wiring.name, each.length, each.p) for each in (found.own, *found.others)]
    assert found.better.wiring.name.startswith(expected)
    assert found.better.length > found.own.length + 0.2
    assert all(0.0 <= share <= 1.0 for share in found.better.by_position)
    assert found.better.wiring.change


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_a_head_that_is_wired_as_trained_is_left_alone(name: str, unchecked: None) -> None:
    """Guards against alarms that make people change what is right."""
    found = diagnosed(files(name, **FIRST), name)
    assert found.own.length > 2.0
    assert found.better is None
    assert len(found.others) >= 5
    assert all(other.length <= found.own.length for other in found.others)


def test_a_head_that_knows_nothing_is_no_miswired_one() -> None:
    """Guards against a diagnosis from noise, and one from a text that proves nothing."""
    model = target()
    with TemporaryDirectory() as folder:
        head = untrained(model)
        write_eagle3(Path(folder), head, None, target_fingerprint(model), ["Model"], {}, "")
        files = read_eagle3(Path(folder))
    assert diagnosed(files).better is None
    with pytest.raises(ValueError, match=r"1 text\(s\): a comparison takes at least two"):
        examine(files, model, texts()[:1])


def test_the_command_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], unchecked: None
) -> None:
    """Guards against a diagnosis that does not reach the reader, or a build that goes on."""
    model, folder = save(tmp_path / "model"), tmp_path / "head"
    monkeypatch.setattr(command, "_NEW_TOKENS", LENGTH)
    written = load(str(model), device="cpu", dtype="float64")
    prompts = token_prompts("humaneval@10:8", written)[0].values()
    told = [(prompt, continuation(written.model, prompt, LENGTH)) for prompt in prompts]
    monkeypatch.setattr(sys.modules[__name__], "target", lambda name: written)
    monkeypatch.setattr(sys.modules[__name__], "texts", lambda name: told)
    head = trained("folder", **FIRST)
    write_eagle3(folder, head, output_rows(written, head.tokens), target_fingerprint(written), ["Model"], {}, "")
    arguments = ["doctor", "--head", str(folder), "--target", str(model), "--dtype", "float64"]
    arguments += ["--prompts", "humaneval@10:8"]
    assert exit_code(monkeypatch, *arguments) == 0
    assert f"{folder} is wired as it was trained" in " ".join(capfd.readouterr().out.split())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_before_residual": False}))
    assert exit_code(monkeypatch, *arguments) == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "norm_before_residual on" in out
    assert f"{folder} is not wired as it was trained" in out
    assert "set norm_before_residual to true in config.json" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "here"], "--head asks for --target"),
        (["--head", "h.safetensors", "--target", "shape:tiny"], "h.safetensors fixes its wiring itself"),
        (["--head", "nowhere", "--target", "shape:tiny"], "no head comes with the package for 'nowhere'"),
        (["--target", "shape:tiny"], "--target is of no use without --head"),
        (["--prompts", "prose"], "--prompts is of no use without --head"),
        (["--head", "here", "--roofline", "shape:tiny"], "two examinations"),
    ],
)
def test_a_wrong_use_is_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against options that are ignored in silence."""
    assert exit_code(monkeypatch, "doctor", *arguments) == 2
    assert message in capfd.readouterr().err
