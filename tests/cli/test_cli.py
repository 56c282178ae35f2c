from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import specdecode
from specdecode import cli, generate, load
from specdecode.bench.arms import parts
from specdecode.bench.measure import roofline as measured_roofline
from specdecode.support import messages
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.fake_clock import Cost, FakeClock, charged
from tests.helpers.learnt import learnt
from tests.helpers.models import ARCHITECTURES, build, continuation
from tests.helpers.spelling import CHARACTERS, pieces


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a model of another vocabulary."""
    return str(save(tmp_path_factory.mktemp("other"), texts=CHARACTERS[::-1], seed=3))


@pytest.mark.parametrize(
    "drafter",
    [
        ("--drafter", "none"),
        ("--drafter", "lookup", "--k", "3"),
        ("--drafter", "lookup", "--controller", "adaptive"),
        ("--draft", "layers:0-1,3"),
        ("--draft", "layers:0", "--tree", "static", "--k", "2"),
        ("--draft", "layers:0-2", "--tree", "best-first"),
    ],
)
def test_generate_streams_the_models_own_text_and_ends_with_measures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str, drafter: tuple[str, ...]
) -> None:
    """Guards against text that is lost or doubled between steps, and options that do not reach the decoder."""
    text = "the cat sat on the mat, the cat sat on"
    code = exit_code(
        monkeypatch, "generate", text, "--target", model, "--max-new-tokens", "40", "--dtype", "float64", *drafter
    )
    out, err = capfd.readouterr()
    loaded = load(model, dtype="float64", device="cpu")
    tokens = continuation(loaded.model, loaded.encode(text), 40)
    expected = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert code == 0
    assert out == expected + "\n"
    measures = r"40 tokens \(length\), [\d.]+ tokens/s, τ [\d.]+(, acceptance \d+%)?, TTFT \d+ ms"
    assert re.fullmatch(rf"{measures}, drafter [a-z+-]+, backend \w+", err.splitlines()[-1])
    assert ("acceptance" in err) == ("none" not in drafter)


@pytest.mark.parametrize("drafter", [("--drafter", "lookup"), ("--draft", "layers:0-2", "--tree", "static")])
def test_drafting_as_long_as_pays_changes_no_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str, drafter: tuple[str, ...]
) -> None:
    """Guards against a controller that does not reach the decoder, and a silent wait while costs are measured."""
    told, measure = threading.Event(), specdecode.measure_costs

    def patient(*of: object) -> specdecode.Costs:
        assert told.wait(timeout=60)
        return measure(*of)

    def note(text: str) -> None:
        if "measuring" in text:
            told.set()

    monkeypatch.setattr(parts, "measure_costs", patient)
    monkeypatch.setattr(messages, "note", note)
    arguments = ("generate", "the cat sat on the mat, the cat", "--target", model, "--dtype", "float64")
    texts = []
    for controller in ("fixed", "cost-aware"):
        assert exit_code(monkeypatch, *arguments, "--max-new-tokens", "40", "--controller", controller, *drafter) == 0
        assert told.is_set() == (controller == "cost-aware")
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("asked_for", [(), ("--drafter", "universal")], ids=["by itself", "asked for"])
def test_a_draft_of_another_vocabulary_drafts_by_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str, other: str, asked_for: tuple[str]
) -> None:
    """Guards against refusing a draft of another vocabulary, and against drafting by text without a note."""
    arguments = ("generate", "the cat sat on", "--target", model, "--max-new-tokens", "20", "--dtype", "float64")
    assert exit_code(monkeypatch, *arguments, "--drafter", "none") == 0
    plain = capfd.readouterr().out
    assert exit_code(monkeypatch, *arguments, "--draft", other, *asked_for) == 0
    out, err = capfd.readouterr()
    assert out == plain
    assert "acceptance" in err.splitlines()[-1]
    told = f"{other} has another vocabulary than {model}: it drafts by text (--drafter universal)"
    assert (told in err.splitlines()) == (not asked_for)


def test_a_bounded_cache_writes_on_beyond_the_context(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards against cache options that do not reach the decoder."""
    model = str(save(tmp_path / "model", context=256))
    texts = []
    for drafter in ("none", "lookup"):
        arguments = ("--target", model, "--policy", "sink-window", "--max-cache", "32", "--drafter", drafter)
        assert exit_code(monkeypatch, "generate", "a cat " * 70, *arguments, "--max-new-tokens", "60") == 0
        out, err = capfd.readouterr()
        texts.append(out)
        assert re.search(
            rf"0\.\d MB of KV after \d{{3}} evictions, drafter {drafter}, backend eager$", err.splitlines()[-1]
        )
    assert texts[0] == texts[1]
    arguments = ("--target", model, "--drafter", "self-streaming", "--max-cache", "20", "--max-new-tokens", "60")
    assert exit_code(monkeypatch, "generate", "a cat " * 10, *arguments) == 0
    streamed = capfd.readouterr().out
    assert exit_code(monkeypatch, "generate", "a cat " * 10, "--target", model, "--max-new-tokens", "60") == 0
    assert capfd.readouterr().out == streamed


def test_an_int8_target_writes_its_own_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against `--quantize` that does not reach the target, or that changes the output depending on the
    drafter.
    """
    arguments = ("generate", "a cat sat", "--target", model, "--dtype", "float64", "--max-new-tokens", "60")
    texts = {}
    for quantize in ((), ("--quantize", "int8")):
        for drafter in ("none", "lookup"):
            assert exit_code(monkeypatch, *arguments, "--drafter", drafter, *quantize) == 0
            texts[len(quantize), drafter] = capfd.readouterr().out
    assert texts[2, "none"] == texts[2, "lookup"] != texts[0, "lookup"]


def test_layers_are_spread_over_devices(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against an option that does not reach the target, and a draft whose layers are spread too. Without a GPU,
    all layers of the target are on the CPU.
    """
    arguments = ("generate", "a cat", "--target", model, "--draft", "layers:0-2", "--max-new-tokens", "20")
    spread: list[tuple[str, str | None]] = []

    def noted(name: str, **options: Any) -> specdecode.LM:
        spread.append((name, options.get("device_map")))
        return load(name, **options)

    monkeypatch.setattr(specdecode, "load", noted)
    written = []
    for option in ((), ("--device-map", "auto")):
        assert exit_code(monkeypatch, *arguments, *option) == 0
        written.append(capfd.readouterr().out)
    assert written[0] == written[1]
    assert spread == [(model, None), ("layers:0-2", None), (model, "auto"), ("layers:0-2", None)]


def test_a_seed_makes_sampling_repeatable(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against a sampling option that is accepted and has no effect."""
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ("--target", model, "--temperature", "1.5", "--top-p", "0.95", "--seed", seed)
        assert exit_code(monkeypatch, "generate", "a cat", *arguments, "--max-new-tokens", "30") == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_file_of_prompts_gives_a_line_of_json_for_each(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    """Guards against prompts that are lost, mixed up or cut, and output that no program can read."""
    prompts = ["the cat sat", 'a "quoted" prompt, a quoted prompt', "a third", "and a much longer one than the others"]
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("\n".join(prompts) + "\n\n")
    lines.write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in prompts))
    loaded = load(model, dtype="float64", device="cpu")
    expected = [loaded.decode(generate(loaded, loaded.encode(prompt), max_new_tokens=20).tokens) for prompt in prompts]
    for file, batch in ((plain, "1"), (lines, "3")):
        arguments = ("--prompts", str(file), "--batch", batch, "--logprobs", "--target", model, "--dtype", "float64")
        assert exit_code(monkeypatch, "generate", *arguments, "--max-new-tokens", "20") == 0
        out, err = capfd.readouterr()
        told = sorted((json.loads(line) for line in out.splitlines()), key=lambda row: row["index"])
        assert [row["prompt"] for row in told] == prompts
        assert [row["text"] for row in told] == [text.replace("\0", "") for text in expected]
        assert all(row["tokens"] == 20 and row["finish_reason"] == "length" for row in told)
        assert ["".join(token for token, _ in row["logprobs"]) for row in told] == expected
        assert all(value <= 0 for row in told for _, value in row["logprobs"])
        assert "4/4 prompts" in err


def test_special_tokens_are_no_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against an answer that ends with <|im_end|> in JSON and without it on the screen. Among log-probabilities
    every token has its name.
    """
    text = "and a much longer one than the others"
    arguments = ("generate", text, "--target", model, "--dtype", "float64", "--max-new-tokens", "20")
    assert exit_code(monkeypatch, *arguments) == 0
    streamed = capfd.readouterr().out
    assert exit_code(monkeypatch, *arguments, "--json", "--logprobs") == 0
    row = json.loads(capfd.readouterr().out)
    named = "".join(token for token, _ in row["logprobs"])
    assert named.count("\0") > 0
    assert streamed == row["text"] + "\n" == named.replace("\0", "") + "\n"


def test_a_text_is_whole_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards against replacement characters where a character spans tokens or before it, against a lost first space,
    and against a stream that differs from the whole text.
    """
    text = " 日本 the end"
    taught = learnt(pieces(["so", "the", "end"]), "so" + text)
    taught.model.save_pretrained(tmp_path)
    taught.tokenizer.save_pretrained(tmp_path)
    arguments = ("generate", "so", "--target", str(tmp_path), "--dtype", "float64", "--max-new-tokens")
    for length, expected in ((3, " "), (4, " 日"), (5, " 日"), (6, " 日"), (7, " 日本"), (9, text)):
        assert exit_code(monkeypatch, *arguments, str(length)) == 0
        assert capfd.readouterr().out == expected + "\n"
        assert exit_code(monkeypatch, *arguments, str(length), "--json", "--logprobs") == 0
        row = json.loads(capfd.readouterr().out)
        assert (row["text"], row["tokens"]) == (expected, length)
        assert "".join(piece for piece, _ in row["logprobs"]) == expected
        assert len(row["logprobs"]) == length


def test_a_stop_string_reaches_the_decoder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against `--stop` that is accepted and has no effect, in either form of output."""
    arguments = ("generate", "the cat sat", "--target", model, "--max-new-tokens", "30")
    assert exit_code(monkeypatch, *arguments) == 0
    whole = capfd.readouterr().out
    expected = whole[: whole.index(whole[12:14]) + 2]
    assert exit_code(monkeypatch, *arguments, "--stop", "\0\0\0", "--stop", expected[-2:]) == 0
    assert capfd.readouterr().out == expected + "\n"
    assert exit_code(monkeypatch, *arguments, "--stop", expected[-2:], "--json") == 0
    row = json.loads(capfd.readouterr().out)
    assert (row["text"], row["finish_reason"], row["index"]) == (expected, "stop", 0)


def test_a_chat_is_put_into_the_model_s_template(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards against a chat model that continues a question instead of answering it."""
    folder = save(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}~{% endfor %}"
        "{% if add_generation_prompt %}[A] {% endif %}"
    )
    arguments = ("--target", str(folder), "--max-new-tokens", "12")
    assert exit_code(monkeypatch, "generate", "[user] who?~[A] ", *arguments) == 0
    expected = capfd.readouterr().out
    assert exit_code(monkeypatch, "generate", "who?", "--chat", *arguments) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("\n \n", "{file} has no prompts: write one per line"),
        ('{"prompt": "a"}\nnot json\n', "line 2 of {file} is no JSON object with a field prompt"),
        ('{"text": "a"}\n', "line 1 of {file} is no JSON object with a field prompt"),
        ('{"prompt": 3}\n', "line 1 of {file} is no JSON object with a field prompt"),
        ('["prompt"]\n', "line 1 of {file} is no JSON object with a field prompt"),
        (b"\xff\xfe", "{file} cannot be read as text"),
        (None, "{file} cannot be read as text"),
    ],
)
def test_a_file_without_prompts_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | bytes | None,
    reason: str,
) -> None:
    """Guards against an error in line 900 that is found after an hour, without the line's number."""
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert exit_code(monkeypatch, "generate", "--prompts", str(file)) == 2
    assert f"specdecode: {reason.format(file=file)}" in " ".join(capfd.readouterr().err.split("\n"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate"], "give either a prompt or a file of them"),
        (["generate", "x", "--prompts", "y"], "give either a prompt or a file of them"),
        (["generate", "x", "--batch", "2"], "--batch is for a file of prompts"),
        (["generate", "x", "--logprobs"], "--logprobs needs --json or --prompts"),
        (["generate", "x", "--target", "{model}", "--stop", ""], "a stop string is empty"),
        (["generate", "x", "--target", "{model}", "--chat"], "has no chat template"),
        (["generate", "x", "--k", "0"], "K is 0"),
        (["generate", "x", "--controller", "adaptive", "--k", "5"], "--k is of no use with --controller adaptive"),
        (["generate", "x", "--controller", "cost-aware", "--k", "5"], "--k is of no use with --controller cost-aware"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--temperature", "1", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "x", "--temperature", "1", "--top-k", "-2"], "top_k is -2"),
        (["generate", "x", "--top-p", "0.9"], "--top-p is of no use at temperature 0, which is greedy"),
        (["generate", "x", "--seed", "3"], "--seed is of no use at temperature 0, which is greedy"),
        (["generate", "--prompts", "y", "--batch", "0"], "--batch is 0: it must be at least 1"),
        (["generate", "x", "--target", "./nowhere"], "no such folder: ./nowhere"),
        (["generate", "x", "--target", "shape:nothing"], "no shape is named 'nothing'"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0: it must be at least 1"),
        (
            ["generate", "x", "--target", "{model}", "--draft", "{other}", "--drafter", "model"],
            "does not share the vocabulary",
        ),
        (
            ["generate", "x", "--target", "{model}", "--draft", "{other}", "--tree", "static"],
            "or let this one draft by text (UniversalDrafter, --drafter universal)",
        ),
        (["generate", "x", "--drafter", "universal"], "--drafter universal needs a draft model"),
        (["generate", "x", "--drafter", "universal", "--draft", "layers:0", "--tree", "static"], "--tree is of no use"),
        (["generate", "x", "--target", "{model}", "--draft", "layers:5"], "ascending indices from 0 to 3"),
        (["generate", "x", "--target", "{model}", "--draft", "layers:a"], "not of the form"),
        (["generate", "x", "--target", "{model}", "--drafter", "model"], "needs a draft model"),
        (["generate", "x", "--target", "{model}", "--drafter", "none", "--draft", "layers:0"], "of no use"),
        (["generate", "x", "--target", "{model}", "--device", "tpu9"], "device 'tpu9'"),
        (["generate", "x", "--target", "{model}", "--dtype", "int3"], "dtype 'int3'"),
        (["generate", "x", "--target", "{model}", "--device-map", "wide"], "device_map is 'wide': 'auto' spreads"),
        (["generate", "x", "--target", "{model}", "--device-map", "auto", "--device", "cpu"], "leave out device"),
        (["generate", "x" * 2048, "--target", "{model}"], "holds 2048"),
        (["generate", "x" * 2000, "--target", "{model}", "--max-new-tokens", "100"], "ask for at most 48"),
        (["generate", "x", "--policy", "amnesia"], "no cache policy is named 'amnesia'"),
        (["generate", "x", "--policy", "sink-window", "--max-cache", "4"], "--max-cache is 4"),
        (["generate", "x", "--max-cache", "64"], "--max-cache is of no use without --policy"),
        (["generate", "x", "--quantize", "int3"], "quantize is 'int3'"),
        (["doctor", "--roofline", "./nowhere"], "no such folder: ./nowhere"),
        (["doctor", "--roofline", "shape:nothing"], "no shape is named 'nothing'"),
        (["doctor", "--roofline", "{model}", "--device", "tpu9"], "device 'tpu9'"),
        (
            ["doctor", "--roofline", "{model}", "--backends", "eager,fast"],
            "no backend is named 'fast'",
        ),
        (["doctor", "--backends", "eager"], "--backends is of no use without --roofline"),
        (["doctor", "--profile"], "--profile is of no use without --roofline"),
        (["doctor", "--roofline", "{model}", "--dtype", "int3"], "dtype 'int3'"),
        (["doctor", "--device", "cpu"], "--device is of no use without --roofline"),
        (["doctor", "--dtype", "float32"], "--dtype is of no use without --roofline"),
        (["fetch", "./nowhere"], "no such folder"),
        (["fetch", "{model}", "--again"], "--again is for"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    model: str,
    other: str,
    arguments: list[str],
    reason: str,
) -> None:
    """Guards against tracebacks, silence, and an exit code that a script cannot tell from success."""
    arguments = [argument.format(model=model, other=other) for argument in arguments]
    assert exit_code(monkeypatch, *arguments) == 2
    out, err = capfd.readouterr()
    told = [line for line in err.splitlines() if line.startswith("specdecode: ")]
    assert len(told) == 1
    assert reason in told[0]
    assert "Traceback" not in err
    assert out == ""


def test_an_unknown_option_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against a misspelt option that is ignored."""
    assert exit_code(monkeypatch, "generate", "x", "--temprature", "1") == 2
    assert "--temprature" in capfd.readouterr().err


def test_fetch_says_that_a_model_is_usable(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against `fetch` that reports a model as usable without loading it."""
    assert exit_code(monkeypatch, "fetch", model) == 0
    assert "context 2,048" in capfd.readouterr().out


def test_doctor_tells_versions_device_and_bandwidth(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a doctor that fails where a package is missing, which is where it is needed, and one that takes
    the hub for usable where the environment forbids to ask it.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert exit_code(monkeypatch, "doctor") == 0
    out = capfd.readouterr().out
    for part in ("torch", "transformers", "threads", "GB/s", "pytest --benchmark", "not asked: HF_HUB_OFFLINE is set"):
        assert part in out
    assert float(re.search(r"memory of cpu\s+([\d.]+) GB/s read", out).group(1)) > 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize(("context", "widest"), [(2048, ["4.10x", "1.31x"]), (20, ["-", "-"])])
def test_doctor_tells_what_backends_make_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    unchecked: None,
    context: int,
    widest: list[str],
) -> None:
    """Guards against a number in the wrong column, row or unit, and against positions beyond the model's context."""
    values = {"tie_word_embeddings": True, "vocab_size": 5000, "max_position_embeddings": context}
    build(ARCHITECTURES["llama"] | values).save_pretrained(tmp_path)
    clock, loaded = FakeClock(noise=0.0), []
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(measured_roofline, "BACKENDS", ("auto", "eager", "packed"))
    monkeypatch.setattr(measured_roofline, "KINDS", ())
    monkeypatch.setattr(measured_roofline, "read_bandwidth", lambda device: 1.3e8)
    with ExitStack() as stack:

        def charging(name: str, **asked: Any) -> specdecode.LM:
            target = load(name, **asked)
            costs = {target.model: Cost(0.009, 0.001), target.with_backend("packed").model: Cost(0.0198, 0.0002)}
            stack.enter_context(charged(clock, costs))
            loaded.append(target)
            return target

        monkeypatch.setattr(specdecode, "load", charging)
        assert (
            exit_code(monkeypatch, "doctor", "--roofline", str(tmp_path), "--device", "cpu", "--dtype", "float32") == 0
        )
    out, err = capfd.readouterr()
    above, below, parts = out.split("\n\n")
    told = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in above.splitlines())
    size = loaded[0].weight_bytes
    assert told["torch"] == torch.__version__
    assert told["model"] == f"{tmp_path} in float32"
    assert told["memory of cpu"] == "0.1 GB/s read"
    config = loaded[0].model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    read = size + token * min(256, max(loaded[0].context_length - 32, 1))
    assert told["read per token"] == f"{read / 1e6:.1f} MB of weights, keys and values"
    assert told["roofline"] == f"{1.3e8 / read:.1f} tokens/s"
    sizes = [f"{of / 1e6:.1f}" for of in (size, size + 4 * 32 * 5000)]
    shares = [f"{rate * read / 1.3e8:.0%}" for rate in (100, 50)]
    assert [re.split(r" {2,}", line.strip()) for line in below.splitlines()] == [
        ["backend or weights", "weights MB", "1 row ms", "tokens/s", "of roofline", "8 rows", "16 rows", "32 rows"],
        ["eager", sizes[0], "10.00", "100.0", shares[0], "1.70x", "2.50x", widest[0]],
        ["packed", sizes[1], "20.00", "50.0", shares[1], "1.07x", "1.15x", widest[1]],
    ]
    assert sizes[0] != sizes[1]
    # Only whole forwards move this clock.
    assert [re.split(r" {2,}", line.strip()) for line in parts.splitlines()] == [
        ["where a row's time goes, ms", "forward", "linear layers", "other layers", "between them"],
        ["eager", "10.00", "0.00", "0.00", "10.00"],
        ["packed", "20.00", "0.00", "0.00", "20.00"],
    ]
    assert "25/25 rounds" in err


def test_doctor_tells_which_backends_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against a fallback shown under the name of the missing backend, and an option that is ignored."""
    monkeypatch.setattr(measured_roofline, "BACKENDS", ("auto", "packed", "eager"))
    monkeypatch.setattr(measured_roofline, "KINDS", ())
    assert exit_code(monkeypatch, "doctor", "--roofline", model, "--dtype", "float64", "--profile") == 0
    out = capfd.readouterr().out
    assert f"{model} in float64" in out
    _, below, parts, *profiles = out.split("\n\n")
    assert [line.split()[0] for line in below.splitlines()] == ["backend", "eager"]
    assert parts.endswith("packed is not available: no library has a layout for float64 on this processor")
    for rows, profile in zip((1, 8), profiles, strict=True):
        head, *operations, total = (re.split(r" {2,}", line.strip()) for line in profile.splitlines())
        assert head == [f"eager, rows {rows}: operation", "calls", "ms", "share"]
        assert len(operations) == 10
        shares = [float(share.rstrip("%")) for _, _, _, share in operations]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) < 100.5
        assert (total[0], total[3]) == ("all", "100.0%")
        assert float(total[1]) > sum(float(calls) for _, calls, _, _ in operations)
    # Real times cannot be checked further. The share is of the roofline, and a busy machine may round it to zero.
    [roofline] = [float(line.split()[1]) for line in out.splitlines() if line.startswith("roofline")]
    _, weights, milliseconds, throughput, share, *multiples = below.splitlines()[1].split()
    assert all(float(value.rstrip("x")) > 0 for value in (weights, milliseconds, throughput, *multiples))
    assert float(share.rstrip("%")) == pytest.approx(100 * float(throughput) / roofline, abs=0.51)


def test_a_full_gpu_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """Guards against a traceback, and against other faults that are taken for a lack of memory."""

    def full(error: RuntimeError) -> Any:
        def load(*given: Any, **named: Any) -> Any:
            raise error

        return load

    monkeypatch.setattr("specdecode.load", full(torch.OutOfMemoryError("CUDA out of memory")))
    assert exit_code(monkeypatch, "generate", "x", "--target", model) == 2
    assert capfd.readouterr().err.startswith("specdecode: the GPU's memory is too small: take a smaller model")
    monkeypatch.setattr("specdecode.load", full(RuntimeError("another fault")))
    monkeypatch.setattr(sys, "argv", ["specdecode", "generate", "x", "--target", model])
    with pytest.raises(RuntimeError, match="another fault"):
        cli.main()


def test_help_does_not_wait_for_torch() -> None:
    """Guards against seconds of imports before a line of help, and before pytest collects anything."""
    code = (
        "import sys, specdecode.cli, specdecode.bench.plugin; sys.argv = ['specdecode', '--help']\n"
        "try: specdecode.cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
