"""The doctor of heads: it names the wrong field of a head's config, and nothing where the config is right."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from specdecode import LM, FixedK, HeadDrafter, generate
from specdecode.cli.doctor_head import write_texts
from specdecode.core.errors import ModelFileError
from specdecode.evals.data import token_prompts
from specdecode.heads.bound import BoundHead, head_shape, untrained
from specdecode.heads.doctor import (
    GreedyText,
    Measured,
    _accepted_lengths,
    _better,
    _compare,
    _hidden_states,
    examine,
)
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import CONFIG, IDS, WEIGHTS, Eagle3Files, make_eagle3, read_eagle3
from specdecode.heads.unrolled import unrolled
from specdecode.heads.wirings import Wiring
from tests.helpers.command_line import exit_code
from tests.helpers.heads import write_head
from tests.helpers.models import ARCHITECTURES, build, moved
from tests.helpers.spelling import characters

# The prompts of the targets, and the number of tokens by which they continue them.
PROMPTS, LENGTH = "prose@6:8", 24
DECODER = "transformer_layer_config"
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": SCALED},
    "qwen3": {},
    "gpt-neox": {},
}


@dataclass(frozen=True)
class Trained:
    """The target that a head is trained for, and the head's wiring."""

    target: str
    ids: tuple[int, ...]
    wiring: Mapping[str, Any]
    decoder: Mapping[str, Any] = field(default_factory=dict)
    every_token: bool = True
    final_norm: bool = False


HEADS = {
    "normed": Trained(
        "llama",
        (1, 2, 4),
        {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": False, "norm_output": True},
        every_token=False,
    ),
    "by layer": Trained("qwen3", (2, 2, 1), {"fc_norm": True}),
    "bare": Trained("gpt-neox", (0, 2, 3), {"fc_norm": False, "own_embeddings": True}, {"num_key_value_heads": 2}),
    "after the norm": Trained("qwen3", (1, 4), {"fc_norm": False, "norm_before_fc": True}, final_norm=True),
}


def values(name: str) -> dict[str, Any]:
    return ARCHITECTURES[name] | {"eos_token_id": None} | TARGETS[name]


@functools.cache
def target(name: str) -> LM:
    return LM(build(values(name)), characters(), name=name)


@functools.cache
def texts(name: str) -> tuple[GreedyText, ...]:
    prompts, _ = token_prompts(PROMPTS, target(name))
    return tuple(write_texts(target(name), prompts, LENGTH))


def hidden_states(name: str, layers: Sequence[int]) -> Tensor:
    """Return the target's hidden states for its texts. [texts, n, F]"""
    states = _hidden_states(target(name), texts(name), [layer for layer in sorted({*layers}) if layer < 4])
    return torch.cat([states[layer] for layer in layers], -1)


@functools.cache
def trained(name: str) -> Eagle3Head:
    """Train a head that knows its target's texts. Its norms are far from 1, so that each applied norm matters."""
    recipe = HEADS[name]
    lm, written = target(recipe.target), torch.stack([text.tokens for text in texts(recipe.target)])
    known = written.unique()[2:]
    tokens = torch.arange(lm.vocab_size) if recipe.every_token else known
    shape = head_shape(lm, [number - 1 for number in recipe.ids])
    for key, value in recipe.decoder.items():
        setattr(shape.decoder, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Eagle3Head(replace(shape, own_output=True, **recipe.wiring), tokens)
        with torch.no_grad():
            for weight in head.parameters():
                if weight.dim() == 1:
                    weight.copy_((0.8 * torch.randn_like(weight)).exp())
    layers = tuple(4 if recipe.final_norm and layer == 3 else layer for layer in shape.layers)
    states = hidden_states(recipe.target, layers)[:, :-2].cpu().float().clone()
    embedding = lm.model.get_input_embeddings().weight.detach().cpu().float()
    place = torch.full((lm.vocab_size,), -100).index_copy(0, tokens, torch.arange(len(tokens)))
    wanted = torch.stack([pad(place[written[:, 2 + ahead :]], (0, ahead), value=-100) for ahead in range(3)])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(70):
        rows = embedding if head.embed_tokens is None else head.embed_tokens.weight
        ahead = enumerate(unrolled(head, rows[written[:, 1:-1]], states, 3))
        own = torch.stack([pad(state[:, step:], (0, 0, 0, step)) for step, state in ahead])
        assert head.lm_head is not None
        loss = cross_entropy(head.logits(own, head.lm_head.weight).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def written(name: str) -> Path:
        return write_head(
            target(HEADS[name].target), tmp_path_factory.mktemp("head"), trained(name), shared_output=True
        )

    return written


def with_decoder(files: Eagle3Files, **changes: Any) -> Eagle3Files:
    return files.rewired(**{DECODER: {**files.config[DECODER], **changes}})


def with_tensors(files: Eagle3Files, **changes: Tensor | None) -> Eagle3Files:
    tensors = {**files.tensors, **{name.replace("__", "."): x for name, x in changes.items()}}
    return replace(files, tensors={name: x for name, x in tensors.items() if x is not None})


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)) - torch.arange(count)


NARROW = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
Mutation = Callable[[Eagle3Files], Eagle3Files]
# The head, the change to its folder, the wiring that the doctor must name, and the remedy that it must print.
MUTATIONS: dict[str, tuple[str, Mutation, str, str]] = {
    "residual flag off": (
        "normed",
        lambda files: files.rewired(norm_before_residual=None),
        "norm_before_residual true",
        "set norm_before_residual to true in config.json",
    ),
    "residual flag on": (
        "by layer",
        lambda files: files.rewired(norm_before_residual=True),
        "norm_before_residual false",
        "set norm_before_residual to false in config.json",
    ),
    "output flag off": (
        "normed",
        lambda files: files.rewired(norm_output=False),
        "norm_output true",
        "set norm_output to true",
    ),
    "output flag on": (
        "by layer",
        lambda files: files.rewired(norm_output=True),
        "norm_output false",
        "set norm_output to false",
    ),
    "norm of all off": (
        "normed",
        lambda files: files.rewired(norm_before_fc=False),
        "norm_before_fc true",
        "set norm_before_fc to true",
    ),
    "norm of all on": (
        "bare",
        lambda files: files.rewired(norm_before_fc=True),
        "norm_before_fc false",
        "set norm_before_fc to false",
    ),
    "norm of all on, with weights": (
        "bare",
        lambda files: with_tensors(files.rewired(norm_before_fc=True), input_norm__weight=torch.linspace(0.1, 3, 96)),
        "norm_before_fc false",
        "set norm_before_fc to false in config.json, and remove input_norm.weight from the weights",
    ),
    "norms of layers off": (
        "by layer",
        lambda files: files.rewired(fc_norm=False),
        "fc_norm true",
        "set fc_norm to true",
    ),
    "norms of layers on": (
        "bare",
        lambda files: files.rewired(fc_norm=True),
        "fc_norm false",
        "set fc_norm to false",
    ),
    "norm of all for those of layers": (
        "by layer",
        lambda files: files.rewired(norm_before_fc=True, fc_norm=False),
        "norm_before_fc false, fc_norm true",
        "set norm_before_fc to false and fc_norm to true",
    ),
    "norms of layers for that of all": (
        "normed",
        lambda files: files.rewired(norm_before_fc=False, fc_norm=True),
        "norm_before_fc true, fc_norm false",
        "set norm_before_fc to true and fc_norm to false",
    ),
    "ids too low": (
        "normed",
        lambda files: files.rewired(**{IDS: [0, 1, 3]}),
        "layer ids one higher: 1, 2, 4",
        f"set {IDS} to [1, 2, 4]",
    ),
    "ids too high": (
        "bare",
        lambda files: files.rewired(**{IDS: [1, 3, 4]}),
        "layer ids one lower: 0, 2, 3",
        f"set {IDS} to [0, 2, 3]",
    ),
    "ids out of range": (
        "normed",
        lambda files: files.rewired(**{IDS: [2, 3, 5]}),
        "layer ids one lower: 1, 2, 4",
        f"set {IDS} to [1, 2, 4]",
    ),
    "ids out of order": (
        "normed",
        lambda files: files.rewired(**{IDS: [4, 1, 2]}),
        "layer ids sorted: 1, 2, 4",
        f"set {IDS} to [1, 2, 4]",
    ),
    "ids not the default": (
        "by layer",
        lambda files: files.rewired(**{IDS: [1, 2, 3]}),
        "layer ids by default: 2, 2, 1",
        f"set {IDS} to [2, 2, 1]",
    ),
    "d2t of ids": (
        "normed",
        lambda files: with_tensors(files, d2t=files.tokens),
        "d2t holds ids",
        "store in d2t the differences between the target's ids and the head's",
    ),
    "d2t lost": (
        "normed",
        lambda files: with_tensors(files, d2t=None),
        "ids as t2d marks them",
        "store in d2t the differences between the ids that t2d marks",
    ),
    "d2t of another head": (
        "by layer",
        lambda files: with_tensors(files, d2t=shuffled(files.config["draft_vocab_size"])),
        "d2t ignored",
        "remove d2t and t2d from the weights",
    ),
    "RoPE base and scaling": (
        "normed",
        lambda files: with_decoder(files, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
        "RoPE base 300, scaling linear",
        'set rope_parameters to {"factor": 4.0, "rope_theta": 300.0, "rope_type": "linear"} in config.json',
    ),
    "RoPE scaling, as older files say it": (
        "normed",
        lambda files: with_decoder(files, rope_parameters=None, rope_theta=300.0),
        "RoPE base 300, scaling linear",
        "in config.json, in place of rope_theta",
    ),
    "RoPE base of others": (
        "bare",
        lambda files: with_decoder(files, rope_parameters={"rope_type": "default", "rope_theta": 3.0}),
        "RoPE base 10000",
        'set rope_parameters to {"rope_theta": 10000.0, "rope_type": "default"}',
    ),
    "width of attention heads": (
        "by layer",
        lambda files: with_decoder(files, model_type="qwen3", **NARROW),
        "4 heads of width 8, as the target's",
        "set head_dim to 8 and num_attention_heads to 4 and num_key_value_heads to 2 in config.json",
    ),
    "embeddings of its own": (
        "by layer",
        lambda files: with_tensors(files, embed_tokens__weight=torch.linspace(-1, 1, 97 * 32).view(97, 32)),
        "the target's embeddings",
        "remove embed_tokens.weight from the weights",
    ),
    "final norm": (
        "after the norm",
        lambda files: files,
        "last layer after the final norm",
        "let the head read the target's last layer after its final norm (config.json has no key for this)",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutated_field_is_named(mutation: str, folder: Callable[[str], Path], unchecked: None) -> None:
    """Guards against a wrong field of a head's config that is not found, or for which another field is blamed."""
    head, mutate, name, remedy = MUTATIONS[mutation]
    lm = target(HEADS[head].target)
    examination = examine(mutate(read_eagle3(folder(head))), lm, texts(HEADS[head].target))
    assert examination.better is not None
    assert examination.better.wiring.name == name
    assert remedy in examination.better.wiring.remedy
    assert examination.better.mean_acceptance_length > 3.0


@pytest.mark.parametrize("head", ["normed", "by layer", "bare"])
def test_a_head_that_is_wired_as_trained_gives_no_alarm(head: str, folder: Callable[[str], Path]) -> None:
    """Guards against a false alarm by which users change a right config."""
    lm = target(HEADS[head].target)
    told: list[tuple[int, int]] = []
    examination = examine(
        read_eagle3(folder(head)), lm, texts(lm.name), lambda done, total, doing: told.append((done, total))
    )
    stated, *others = examination.measured
    assert examination.better is None
    assert not examination.refusal
    assert examination.drafts
    assert stated.mean_acceptance_length > 4.0
    assert len(others) >= 6
    assert len({other.wiring.name for other in others}) == len(others)
    # Every wiring matters to these heads, so each must have its own result.
    assert all(other.high < 0 for other in others)
    assert told == sorted(told)
    assert told[-1][0] < told[-1][1]


def shortened(files: Eagle3Files, rows: int) -> Eagle3Files:
    """Return a head of the first tokens alone."""
    tensors = {f"{name}__weight": files.tensors[f"{name}.weight"][:rows] for name in ("embed_tokens", "lm_head")}
    return with_tensors(with_decoder(files, vocab_size=rows).rewired(draft_vocab_size=rows), **tensors)


@pytest.mark.parametrize(("name", "lacks"), [("normed", False), ("bare", True)])
def test_what_is_measured_is_what_drafting_accepts(name: str, lacks: bool, folder: Callable[[str], Path]) -> None:
    """Guards against a doctor that judges other states, positions or masks than drafting uses, or places that are off
    by one, and against an error at a token that the head's own embeddings lack.
    """
    source = HEADS[name].target
    lm, depths, files = target(source), set(), read_eagle3(folder(name))
    if lacks:
        files = shortened(files, int(sorted(text.tokens[1:-1].max() for text in texts(source))[4]))
    head = make_eagle3(files, 4, 32)
    bound = BoundHead(head, lm)
    assert lacks == any(int(text.tokens.max()) >= bound.vocab_size for text in texts(source))
    by_text = _accepted_lengths(head.double(), lm, texts(source), hidden_states(source, head.shape.layers))
    for text, accepted in zip(texts(source), map(torch.Tensor.tolist, by_text), strict=True):
        assert len(accepted) == len(text.tokens) - text.given - 3
        prompt = text.tokens[: text.given].tolist()
        result = generate(lm, prompt, drafter=HeadDrafter(bound), controller=FixedK(4), max_new_tokens=LENGTH)
        assert [*prompt, *result.tokens] == text.tokens.tolist()
        # The first step proposes nothing. Each later step drafts from the end of the one before.
        place, steps = 1, [step.accepted for step in result.steps[1:]]
        # (The last step drafts one token less, which is the target's.)
        while place < len(accepted) - 1:
            assert steps.pop(0) == accepted[place]
            depths.add(accepted[place])
            place += accepted[place] + 1
    assert {0, 4} < depths


def compared(*by_wiring: Tensor) -> tuple[Measured, ...]:
    """Return the comparison for these accepted lengths, [texts, places] for each wiring."""
    files = Eagle3Files(Path(), {}, {})
    return _compare({Wiring(str(i), "", files): list(lengths) for i, lengths in enumerate(by_wiring)}, "")


def test_wirings_that_differ_by_chance_give_no_alarm() -> None:
    """Guards against a false alarm for one of many wirings that really accept the same, and against an alarm about a
    negligible gain.
    """
    rng = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(200):
        # As with real texts, some are easy for all wirings, and some for one.
        easy = 2 + 0.5 * torch.randn(1, 8, 1, generator=rng) + 0.2 * torch.randn(12, 8, 1, generator=rng)
        lengths = (easy + torch.randn(12, 8, 60, generator=rng)).round().clamp(0, 4)
        alarms += _better(compared(*lengths)) is not None
    assert alarms <= 10
    one = torch.ones(8, 100)
    assert _better(compared(one, one)) is None
    slightly, noticeably = one.clone(), one.clone()
    slightly[:, :3], noticeably[:, :5] = 2, 2
    assert _better(compared(one, slightly)) is None
    better = _better(compared(one, slightly, noticeably))
    assert better is not None
    assert better.wiring.name == "2"
    assert better.gain == pytest.approx(0.05)
    assert better.mean_acceptance_length == pytest.approx(2.05)
    assert better.by_position == pytest.approx((1.0, 0.05, 0.0, 0.0))


def test_intervals_hold_together() -> None:
    """Guards against intervals of another distribution, or without a correction for several comparisons."""
    old, new = torch.zeros(5, 1), torch.tensor([[1], [2], [3], [4], [2]])
    _, alone = compared(old, new)
    # The mean 2.4 with Student's t of 4 degrees of freedom, 2.776, and the standard error 0.5099.
    assert (alone.gain, alone.low, alone.high) == pytest.approx((2.4, 2.4 - 1.4156, 2.4 + 1.4156), abs=1e-3)
    _, first, *_ = compared(old, new, old, old, old, old)
    assert first.high - first.low > 1.5 * (alone.high - alone.low)


def test_a_head_of_which_nothing_is_accepted_is_no_trained_head(tmp_path: Path) -> None:
    """Guards against a head of random weights, or of another target, that is reported as wired as trained."""
    lm = target("qwen3")
    examination = examine(read_eagle3(write_head(lm, tmp_path, untrained(lm))), lm, texts("qwen3"))
    assert examination.better is None
    assert not examination.drafts


def test_other_ids_are_no_mistake_where_the_output_embedding_is_shared(tmp_path: Path) -> None:
    """Guards against advice to propose other tokens only because more frequent tokens are accepted more often."""
    lm = target("qwen3")
    files = read_eagle3(write_head(lm, tmp_path, untrained(lm), shared_output=True))
    assert not [name for name in names(files, lm) if "d2t" in name or "t2d" in name]
    damaged = with_tensors(files, d2t=files.tokens)
    assert [name for name in names(damaged, lm) if "d2t" in name or "t2d" in name] == ["d2t holds ids"]


def names(files: Eagle3Files, lm: LM) -> list[str]:
    return [measured.wiring.name for measured in examine(files, lm, texts(lm.name)).measured]


def test_weights_that_fit_no_wiring_are_reported(folder: Callable[[str], Path]) -> None:
    """Guards against a traceback, or an empty table, for a folder that is damaged in another way."""
    files = read_eagle3(folder("by layer"))
    with pytest.raises(ModelFileError, match=r"does not fit its config.json: it lacks fc.weight"):
        examine(with_tensors(files, fc__weight=None), target("qwen3"), texts("qwen3"))
    with pytest.raises(ModelFileError, match=r"does not fit its config.json: .*num_attention_heads"):
        examine(with_decoder(files, num_attention_heads="4"), target("qwen3"), texts("qwen3"))
    with pytest.raises(ModelFileError, match=r"does not fit its config.json: 'transformer_layer_config'"):
        examine(replace(files, config={"draft_vocab_size": 97}), target("qwen3"), texts("qwen3"))


def test_texts_that_cannot_be_judged_by() -> None:
    """Guards against a verdict from one or two texts, or from tokens after the end of an answer."""
    lm = target("llama")
    with pytest.raises(ValueError, match=r"continues 3 of 3 prompts by 16 tokens or more: a judgement needs 4"):
        write_texts(lm, {str(i): [i + 3] for i in range(3)}, 16)
    with pytest.raises(ValueError, match=r"llama continues 0 of 5 prompts by 16 tokens"):
        write_texts(lm, {str(i): [i + 3] for i in range(5)}, 15)
    with pytest.raises(ValueError, match=r"a has 500 tokens, and 24 more do not fit the context of llama, which"):
        write_texts(lm, {"a": [5] * 500}, LENGTH)
    plain = write_texts(lm, {str(i): [i + 3] for i in range(8)}, 20)
    end = int(plain[0].tokens[17])
    ending = LM(build(values("llama") | {"eos_token_id": end}), name="ending")
    ended = write_texts(ending, {str(i): [i + 3] for i in range(8)}, 20)
    assert 17 in [len(text.tokens) - text.given for text in ended]
    assert all(end not in text.tokens[1:-1] for text in ended)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    moved(build(values("llama")), "cpu").save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


def test_the_doctor_s_command(
    model: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    unchecked: None,
) -> None:
    """Guards against an exit code that lets a miswired head pass, numbers of another wiring, and a folder that cannot
    be loaded and that the doctor refuses or lets pass.
    """
    config, tensors = json.loads((folder("normed") / CONFIG).read_text()), load_file(folder("normed") / WEIGHTS)

    def doctor(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[int, list[str]]:
        (tmp_path / CONFIG).write_text(json.dumps(config))
        save_file(tensors, tmp_path / WEIGHTS)
        of_head = ("--head", tmp_path, "--target", model, "--prompts", PROMPTS, "--max-new-tokens", LENGTH)
        code = exit_code(monkeypatch, "doctor", *of_head, "--dtype", "float64", "--device", "cpu")
        return code, capfd.readouterr().out.splitlines()

    code, lines = doctor(config, tensors)
    assert (code, lines[-1]) == (0, "wired as trained: no other wiring accepts more")
    assert lines[0].startswith("8 texts by ")
    assert "prose@6: pydoc_data.topics" in lines[0]
    assert " ".join(lines[1].split()) == "wiring token 1 token 2 token 3 token 4 tokens a step gain"
    assert lines[2].startswith("as config.json says ")
    best = lines[2].split()[-1]
    code, lines = doctor(config | {"norm_before_fc": False, "fc_norm": True}, tensors)
    remedy = "set norm_before_fc to true and fc_norm to false in config.json"
    brings = f"which brings {best} tokens a step in place of 1.00"
    assert (code, lines[-1]) == (1, f"not wired as trained: {remedy}, {brings}")
    assert " ".join(lines[2].split()[3:]) == "0% 0% 0% 0% 1.00 cannot be used"
    [row] = [line for line in lines if line.startswith("norm_before_fc true, fc_norm false ")]
    assert f"{best} +{float(best) - 1:.2f} (+" in " ".join(row.split())
    code, lines = doctor(config, tensors | {"t2d": tensors["t2d"].roll(1)})
    assert code == 1
    assert lines[-1].startswith("no other wiring accepts more, but the head cannot be loaded: d2t and t2d of the")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--target", "x"), "--target is of no use without --head: leave it out"),
        (("--prompts", "prose"), "--prompts is of no use without --head: leave it out"),
        (("--roofline", "x", "--max-new-tokens", "5"), "--max-new-tokens is of no use without --head: leave it out"),
        (("--head", "x", "--roofline", "x"), "--roofline and --head exclude each other: give one of them"),
        (("--head", "x", "--max-new-tokens", "0"), "--max-new-tokens is 0: it is a number from 1"),
        (("--head", "x"), "there is no draft head 'x': name the folder of a head"),
        (
            ("--head", "{head}", "--target", "{model}", "--prompts", "prose@6:3", "--max-new-tokens", "16"),
            "continues 3 of 3 prompts by 16 tokens or more: a judgement needs 4 such texts",
        ),
        (("--head", "{head}", "--target", "{model}", "--prompts", "none"), "no data set is named 'none'"),
    ],
)
def test_wrong_use_is_told_in_one_sentence(
    arguments: tuple[str, ...],
    reason: str,
    model: str,
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Guards against a traceback, options that are ignored, and minutes of work before a mistake is reported."""
    filled = [argument.format(head=folder("normed"), model=model) for argument in arguments]
    assert exit_code(monkeypatch, "doctor", *filled) == 2
    written = capfd.readouterr()
    assert not written.out
    assert reason in " ".join(written.err.split())
    assert "Traceback" not in written.err
