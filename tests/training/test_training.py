"""Training a draft head: its data, its progress, and its resumption after a kill."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList

from specdecode import LM, load
from specdecode.backends.layers import decoder_layers
from specdecode.core.errors import ModelFileError, UnsupportedModelError
from specdecode.core.sampling import Sampling
from specdecode.core.slots import Slots
from specdecode.evals.data import documents
from specdecode.heads.bound import output_rows
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import OWN, read_eagle3
from specdecode.models.recording import recorded_hidden_states
from specdecode.training import recipe
from specdecode.training.initial_head import frequent_tokens, initial_head
from specdecode.training.loss import CrossEntropy, predict_ahead
from specdecode.training.recipe import Recipe, _digest, acceptance_lengths, train_head, work_folder
from specdecode.training.shards import Shard, collect, read_shard
from specdecode.training.texts import ASK, CHAT, Draw, Texts
from specdecode.training.trainer import Trainer, TrainingSettings
from tests.helpers import families
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.heads import write_head
from tests.helpers.learnt import learnt
from tests.helpers.models import ARCHITECTURES, build, lm
from tests.helpers.spelling import characters

LENGTH = 40
LAYERS = (0, 2, 3)


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a data set whose documents each consist of one letter."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"text": letter * 900}) for letter in string.ascii_lowercase[:12]]
    (folder / "pg19_test.jsonl").write_text("\n".join(rows))
    monkeypatch.setenv("SPECDECODE_DATA", str(folder))
    return folder


@pytest.fixture(scope="module")
def target() -> LM:
    """Train a target that knows two sentences, so that its output is predictable."""
    return learnt(
        characters(), "The quick brown fox jumps over the lazy dog. " * 2, "Pack my box with five dozen jugs! " * 2
    )


@pytest.fixture(scope="module")
def shards(target: LM, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    texts = Texts(target, ["prose"], LENGTH, own=1.0)
    return collect(target, texts, (0, 1), tmp_path_factory.mktemp("shards"), 2, {"texts": "own"})


def trained(target: LM, shards: list[Path], checkpoint: Path, settings: TrainingSettings) -> Trainer:
    head = initial_head(target, (0, 1), frequent_tokens(shards, 64), read_shard(shards[0]).tokens[0])
    return Trainer(target, head, shards, settings, checkpoint)


def one_by_one(
    head: Eagle3Head, target: LM, rows: torch.Tensor, text: torch.Tensor, states: torch.Tensor, real: int, own: int
) -> torch.Tensor:
    """Return the distribution behind a text, read as a drafter does.

    The first `real` tokens are read with the target's states, and `own` more with the head's own states.
    """
    slots = Slots(1, target.device)
    embedded = target.model.get_input_embeddings()(text)
    state = head.fused(states[: real - 1])
    for start, end in ((1, real), *((place, place + 1) for place in range(real, real + own))):
        slots.append(torch.arange(start, end))
        visible = torch.ones(end - start, end - 1, dtype=torch.bool).tril(start - 1)
        state = head(
            embedded[None, start:end],
            state[None],
            torch.arange(start, end),
            slots.update,
            visible,
        )[0, -1:]
    return head.logits(state, rows)[0].log_softmax(-1)


@pytest.mark.parametrize("proposed", [60, 1])
def test_a_head_is_trained_as_it_drafts(proposed: int, unchecked: None) -> None:
    """Guards against an attention, a position or a hidden state that is one token off between training and drafting."""
    target = lm("llama")
    tokens = torch.randperm(target.vocab_size, generator=torch.Generator().manual_seed(0))[:proposed].sort().values
    text = torch.randint(target.vocab_size, (9,), generator=torch.Generator().manual_seed(1))
    head = initial_head(target, LAYERS, tokens, text).double()
    rows = output_rows(target, tokens)
    with torch.inference_mode(), recorded_hidden_states(target.model, LAYERS) as outputs:
        logits = target.model(text[None], use_cache=False).logits[0]
    states = torch.cat([out[0] for out in outputs], -1)
    best = logits.softmax(-1).topk(16)
    place = torch.full((target.vocab_size,), -1)
    place[tokens] = torch.arange(len(tokens))
    batch = Shard(text[None], states[None], best.indices[None], best.values[None])
    with torch.inference_mode():
        counts, losses, agreed = predict_ahead(head, target.model.get_input_embeddings(), rows, place, batch, 3)
        for own in range(3):
            expected, same, places = 0.0, 0, range(1 + own, len(text))
            for last in places:
                distribution = one_by_one(head, target, rows, text, states, last + 1 - own, own)
                wanted = place[best.indices[last]]
                expected -= sum(
                    (p * distribution[w]).item() for p, w in zip(best.values[last], wanted, strict=True) if w >= 0
                )
                same += int(distribution.argmax() == wanted[0])
            assert counts[own] == len(places)
            assert losses[own].item() == pytest.approx(expected, rel=1e-4)
            assert agreed[own] == same


def test_the_loss_falls_the_way_its_derivative_says() -> None:
    """Guards against a hand-written derivative of another function."""
    mixer = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, dtype=torch.float64, generator=mixer, requires_grad=True)
    wanted = torch.stack([torch.randperm(11, generator=mixer)[:5] for _ in range(12)]).view(3, 4, 5)
    wanted[:, :, 3:] = -1
    probs = torch.rand(3, 4, 5, dtype=torch.float64, generator=mixer).where(wanted >= 0, 0.0)
    assert torch.autograd.gradcheck(lambda given: CrossEntropy.apply(given, wanted, probs), (logits,))


@pytest.mark.parametrize(("name", "fits"), [("llama", True), ("gpt-neox", False), ("gpt-2", False)])
def test_a_head_begins_as_the_last_layer(name: str, fits: bool) -> None:
    """Guards against training steps wasted on the target's own knowledge, and against architectures without an initial
    head.
    """
    target = lm(name)
    head = initial_head(target, LAYERS, torch.arange(50), torch.arange(20))
    own = [value.float() for value in decoder_layers(target.model)[-1].state_dict().values()]
    for part, value in head.state_dict().items():
        if part.endswith("_proj.weight"):
            # The first half of the attention's input is the embedding, which the target's layer never reads.
            read = value[:, 32:] if value.shape[1] == 64 else value
            assert any(torch.equal(each, read) for each in own) == fits, part
    # The head's input is about as large as that layer's.
    with torch.inference_mode(), recorded_hidden_states(target.model, [2]) as outputs:
        target.model(torch.arange(20)[None], use_cache=False)
    size = outputs[0].square().mean().sqrt().item()
    read = head.fused(torch.randn(9, 96)).square().mean().sqrt().item()
    assert size / 2 < read < size * 2


def test_loss_falls_and_acceptance_rises(target: LM, shards: list[Path], tmp_path: Path, unchecked: None) -> None:
    """Guards against a training that changes nothing, or improves an input that drafting does not use."""
    training = trained(
        target, shards, tmp_path / "checkpoint.pt", TrainingSettings(epochs=6, batch=16, ahead=3, rate=3e-3)
    )
    prompts = {"own/0": target.encode("The quick"), "own/1": target.encode("Pack my")}
    before = acceptance_lengths(target, training.head, prompts)
    training.run(lambda *_: None, lambda each: acceptance_lengths(target, each.head, prompts))
    first, last = training.epochs[0], training.epochs[-1]
    assert all(late < early for early, late in zip(first.losses, last.losses, strict=True))
    assert last.agreements[0] > first.agreements[0]
    assert last.acceptance["own"] > before["own"] + 0.5


class Killed(Exception):
    """An exception in place of a signal."""


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    target: LM, shards: list[Path], tmp_path: Path, unchecked: None
) -> None:
    """Guards against an order, an optimiser moment or a learning rate that is lost with the process."""
    settings = TrainingSettings(epochs=2, batch=32, ahead=2)
    whole = trained(target, shards, tmp_path / "whole.pt", settings)
    whole.run(lambda *_: None, lambda _: {})

    def kill(done: int, total: int, doing: str) -> None:
        if done in killed_at:
            killed_at.remove(done)
            raise Killed

    # Killed in the first shard, before any checkpoint, in the second shard, and in the second epoch.
    killed_at = {96, 512, 1024}
    for _ in range(3):
        with pytest.raises(Killed):
            trained(target, shards, tmp_path / "again.pt", settings).run(kill, lambda _: {})
    again = trained(target, shards, tmp_path / "again.pt", settings)
    again.run(kill, lambda _: {})
    assert again.epochs == whole.epochs
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name


def test_a_checkpoint_of_another_training_is_not_gone_on_with(target: LM, shards: list[Path], tmp_path: Path) -> None:
    """Guards against a head that mixes two training recipes."""
    trained(target, shards, tmp_path / "c.pt", TrainingSettings(epochs=1, batch=64, ahead=1)).run(
        lambda *_: None, lambda _: {}
    )
    settings = TrainingSettings(epochs=2, batch=64, ahead=1)
    with pytest.raises(ValueError, match="training with other settings: remove it"):
        trained(target, shards, tmp_path / "c.pt", settings)
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"c\.pt is damaged: remove it to start the training anew"):
        trained(target, shards, tmp_path / "c.pt", settings)


def test_the_first_documents_are_held_out(books: Path) -> None:
    """Guards against acceptance that is measured on the training data."""
    target = lm("llama")
    order = [document.text[0] for document in documents("pg-19")[0]]
    texts = Texts(target, ["pg-19"], LENGTH, own=0.0, held_out=5)
    drawn = {target.decode(text)[0] for number in range(4) for text in texts.draw(number, 16)}
    assert drawn <= set(order[5:])
    assert len(drawn) > 3


def test_the_target_writes_its_share(books: Path) -> None:
    """Guards against texts that are all the corpus's or all the target's, or that differ when drawn again."""
    target = lm("llama")
    texts = Texts(target, ["pg-19"], LENGTH, own=0.5, held_out=1)
    drawn = texts.draw(3, 40)
    own = [text for text in drawn if len(set(text)) > 1]
    assert 8 <= len(own) <= 32
    assert all(len(set(text[:32])) == 1 for text in own)
    assert {len(text) for text in drawn} == {LENGTH}
    assert texts.draw(3, 40) == drawn
    assert texts.draw(4, 40) != drawn


def chatty() -> LM:
    target = LM(lm("llama").model, characters(), name="chatty")
    target.tokenizer.chat_template = "[user] {{ messages[0]['content'] }} [end]"
    return target


def test_a_chat_begins_as_the_template_does() -> None:
    """Guards against questions that the target cannot recognise as questions."""
    target = chatty()
    texts = Texts(target, [CHAT], LENGTH)
    assert {target.decode(text)[:7] for text in texts.draw(0, 8)} == {"[user] "}
    assert len({tuple(text) for text in texts.draw(0, 8)}) == 8


def test_a_question_is_about_a_passage(books: Path) -> None:
    """Guards against questions without their passage, passages that are held out, and turns without an end."""
    target, order = chatty(), [document.text[0] for document in documents("pg-19")[0]]
    texts = Texts(target, ["pg-19", ASK], 300, own=0.0, held_out=5)
    drawn = texts.draw(0, 24)
    assert {len(text) for text in drawn} == {300}
    asked = [target.decode(text)[:150] for text in drawn if target.decode(text).startswith("[user] ")]
    assert len(asked) == 12
    passages = {text.partition("\n\n")[2].removesuffix(" [end]") for text in asked}
    assert all(len(passage) > 32 and set(passage) <= {passage[0]} for passage in passages)
    assert {passage[0] for passage in passages} <= set(order[5:])
    assert len({text.partition("\n\n")[0] for text in asked}) > 3
    assert texts.draw(0, 24) == drawn


def test_what_cannot_follow_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against drawing a token of probability zero at the smallest or the largest random number."""
    distribution = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    for number, token in ((0.0, 1), (1.0 - 2**-24, 2)):
        monkeypatch.setattr(torch, "rand", lambda size, number=number, **_: torch.full(size, number).double())
        assert Draw(Sampling(0.8))(torch.zeros(1, 1, dtype=torch.long), distribution).argmax() == token


def test_what_the_target_writes_is_drawn_from_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against texts at another temperature, and against the most probable text repeated again and again."""
    target, seen = chatty(), []
    distribution = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -torch.inf])

    def write(ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: object) -> torch.Tensor:
        scores = logits_processor(ids, distribution.expand(len(ids), -1))
        seen.append(scores.argmax(-1))
        assert bool(((scores == 0.0).sum(-1) == 1).all())
        return ids

    monkeypatch.setattr(target.model, "generate", write)
    Texts(target, [CHAT], LENGTH).draw(0, 20_000)
    shares = torch.bincount(seen[0], minlength=5) / 20_000
    torch.testing.assert_close(shares, (distribution / 0.8).softmax(-1), atol=0.015, rtol=0.0)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["nonsense"], {}, "no data set is named 'nonsense'"),
        (["humaneval"], {}, "humaneval has no documents"),
        ([CHAT], {}, "has no chat template"),
        (["pg-19", ASK], {"length": 300}, "has no chat template"),
        ([CHAT, ASK], {}, "ask asks about passages of data sets"),
        (["pg-19"], {"held_out": 12}, "no documents of 40 tokens beyond the 12"),
        (["pg-19"], {"own": 1.5}, "own is 1.5: a share"),
        (["pg-19"], {"length": 10_000}, "length is 10000"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(
    books: Path, parts: list[str], settings: dict[str, float], message: str
) -> None:
    """Guards against an hour of work before a wrong word is reported."""
    with pytest.raises(ValueError, match=message):
        Texts(lm("llama"), parts, **{"length": LENGTH, **settings})


def test_a_target_that_can_have_no_head_is_told_first(tmp_path: Path) -> None:
    """Guards against hours of collecting hidden states for a head that is then refused."""
    target, out = LM(families.build("gemma3n_text")), tmp_path / "head"
    with pytest.raises(UnsupportedModelError, match="cannot have the sizes of Gemma3n"):
        train_head(target, "gemma", Recipe(("prose",), tokens=1, length=LENGTH), out, "", lambda *progress: None)
    assert not work_folder(out).exists()


def test_shards_that_are_there_stay(target: LM, tmp_path: Path) -> None:
    """Guards against repeated work, and against hidden states of one recipe used for another."""
    texts = Texts(target, ["prose"], LENGTH, own=0.0)
    [first] = collect(target, texts, (1,), tmp_path, 1, {"layers": [1]})
    written = first.stat().st_mtime_ns
    both = collect(target, texts, (1,), tmp_path, 2, {"layers": [1]})
    assert both[0].stat().st_mtime_ns == written
    assert read_shard(both[1]).tokens.tolist() != read_shard(both[0]).tokens.tolist()
    with pytest.raises(ValueError, match="hidden states of a training with other layers"):
        collect(target, texts, (0,), tmp_path, 2, {"layers": [0]})


def test_other_texts_and_weights_of_the_same_name_are_told_apart(books: Path) -> None:
    """Guards against hidden states of texts, or of a model, that were replaced under the same name."""
    file = books / "pg19_test.jsonl"
    before = Texts(lm("llama"), ["pg-19"], LENGTH, held_out=1).digest
    assert Texts(lm("llama"), ["pg-19"], LENGTH, held_out=1).digest == before
    file.write_text(file.read_text().replace("eeee", "aaaa"))
    assert Texts(lm("llama"), ["pg-19"], LENGTH, held_out=1).digest != before
    before = _digest(lm("llama"))
    assert _digest(lm("llama")) == before != _digest(lm("llama", 5))
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        tuned = LM(build(ARCHITECTURES["llama"]))
        assert _digest(tuned) == before
        with torch.no_grad():
            weight = tuned.model.get_parameter(name)
            weight += 1e-3 * torch.outer(torch.rand(weight.shape[0]), torch.rand(weight.shape[1])).to(weight)
        assert _digest(tuned) != before


def test_a_seed_that_cannot_be_drawn_with_is_refused() -> None:
    """Guards against a traceback after the model was loaded."""
    with pytest.raises(ValueError, match="seed is 4294967296: from 0 to 4294967295"):
        TrainingSettings(seed=2**32)


def test_the_progress_tells_each_token_and_text(target: LM, tmp_path: Path) -> None:
    """Guards against minutes without a sign of life: a small training has one shard, and counts in texts."""
    told: list[tuple[int, int, str]] = []
    texts = Texts(target, ["prose"], LENGTH, own=0.5)
    collect(target, texts, (1,), tmp_path, 1, {"layers": [1]}, lambda *progress: told.append(progress))
    assert {(done, total) for done, total, _ in told} == {(0, 256)}  # no shard is finished yet
    written = [doing for done, _, doing in told if "token" in doing]
    assert [doing.partition(", ")[2] for doing in written] == [f"token {token} of 8" for token in range(1, 9)]
    read = [doing.partition(", ")[2] for *_, doing in told if "finished" in doing]
    assert read == [f"{texts} finished" for texts in range(8, 257, 8)]


def test_a_training_that_is_stopped_tells_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a user who looks for an option: unlike the suites, a training needs no --resume."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train_head", interrupted)
    arguments = ("--target", str(save(tmp_path / "model")), "--data", "prose", "--length", "40")
    assert exit_code(monkeypatch, "train-head", *arguments, "--out", str(tmp_path / "head")) == 130
    *_, how, interrupted_ = capfd.readouterr().err.splitlines()
    assert how == "The same command goes on after the last finished shard of 256 texts."
    assert interrupted_ == "specdecode: interrupted"


def test_a_passage_must_have_room(books: Path) -> None:
    """Guards against questions about almost empty passages."""
    with pytest.raises(ValueError, match="a question about a passage fills half of a text, and needs") as told:
        Texts(chatty(), ["pg-19", ASK], LENGTH)
    least = int(str(told.value).split()[-2])
    with pytest.raises(ValueError, match=f"and needs at least {least} tokens"):
        Texts(chatty(), ["pg-19", ASK], 2 * least - 1)
    assert len(Texts(chatty(), ["pg-19", ASK], 2 * least, held_out=5).draw(0, 2)) == 2


def test_a_damaged_shard_is_one_sentence(shards: list[Path], tmp_path: Path) -> None:
    """Guards against a traceback before the first step."""
    (tmp_path / "shard.safetensors").write_bytes(shards[0].read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="damaged: remove it, and run again to create it anew"):
        frequent_tokens([shards[1], tmp_path / "shard.safetensors"], 8)


def test_a_shard_holds_what_the_target_says(target: LM, shards: list[Path]) -> None:
    """Guards against training on hidden states of another token or layer than stated."""
    shard = read_shard(shards[0])
    with torch.inference_mode():
        output = target.model(shard.tokens[:2], use_cache=False, output_hidden_states=True)
    # The outputs of layer 0. transformers returns those of the last layer only after the final norm.
    expected = torch.nn.functional.rms_norm(output.hidden_states[1], (output.hidden_states[1].shape[-1],))
    width = expected.shape[-1]
    torch.testing.assert_close(shard.hidden_states[:2, :, :width].to(expected.dtype), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(shard.top[:2, :, 0], output.logits.argmax(-1))
    found = output.logits.float().softmax(-1).gather(-1, shard.top[:2])
    torch.testing.assert_close(shard.probs[:2], found, atol=1e-3, rtol=1e-3)


def test_the_command_writes_a_head_and_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], unchecked: None
) -> None:
    """Guards against a command that fails although each of its parts works."""
    model, out = save(tmp_path / "model"), tmp_path / "head"
    recipe = ["--target", str(model), "--data", "prose", "--tokens", "5000", "--length", "40", "--vocabulary", "50"]
    recipe += ["--out", str(out), "--epochs", "2", "--batch", "32", "--ahead", "2"]
    assert exit_code(monkeypatch, "train-head", *recipe) == 0
    said = capfd.readouterr()
    assert f"the head and its card are in {out}" in said.out
    assert "epoch 2: drafting for 4 held-out texts" in said.err
    files = read_eagle3(out)
    card = files.card
    assert card is not None
    assert len(files.tokens) == 50
    assert files.tensors["lm_head.weight"].shape == (50, 32)
    assert card["tokens"] == 256 * 40
    assert [len(epoch["losses"]) for epoch in card["epochs"]] == [2, 2]
    assert card["epochs"][1]["acceptance"]["prose"] >= 1.0
    page = (out / "README.md").read_text()
    assert "specdecode train-head --target" in page
    assert "prose: pydoc_data.topics" in page
    # All parts exist, so they are only put together again.
    assert exit_code(monkeypatch, "train-head", *recipe) == 0
    again = read_eagle3(out).card
    assert again is not None
    assert again["epochs"] == card["epochs"]
    # Weights shared with the target need not be stored.
    assert exit_code(monkeypatch, "train-head", *recipe, "--shared-output") == 0
    assert "lm_head.weight" not in read_eagle3(out).tensors


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a short training, without its head's folder."""
    model = save(tmp_path_factory.mktemp("model"))
    options = ["--target", str(model), "--data", "prose", "--tokens", "5000", "--length", str(LENGTH), "--own", "0"]
    return ["train-head", *options, "--epochs", "1", "--batch", "32", "--ahead", "2"]


def test_a_head_is_trained_further(
    command_line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """Guards against a training that starts anew in silence, and against a card that hides the earlier training."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--vocabulary", "50", "--layers", "1,3"]
    assert exit_code(monkeypatch, *command_line, "--out", str(first), *options) == 0
    assert exit_code(monkeypatch, *command_line, "--out", str(second), "--start", str(first)) == 0
    before, after = read_eagle3(first), read_eagle3(second)
    assert before.card is not None
    assert after.card is not None
    assert after.card["start"]["card"] == before.card
    assert after.card["vocabulary"] == 50
    assert after.card["layers"] == [1, 3]
    assert torch.equal(after.tokens, before.tokens)
    assert after.card["epochs"][0]["losses"][0] < before.card["epochs"][0]["losses"][0]
    page = (second / "README.md").read_text()
    assert f"It began as the head {first}, which was trained before:" in page
    assert page.count("    specdecode train-head --target") == 2


def test_a_checkpoint_of_another_start_is_not_gone_on_with(
    command_line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a head that is said to begin as another one, and does not."""
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        assert exit_code(monkeypatch, *command_line, "--out", str(out), "--vocabulary", "50") == 0
    assert exit_code(monkeypatch, *command_line, "--out", str(second), "--start", str(first)) == 2
    assert "checkpoint.pt is of a training with other start" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--vocabulary", "50"), "vocabulary is of no use with start: the head {head} keeps its own"),
        (("--layers", "1,3"), "layers is of no use with start: the head {head} keeps its own"),
        (("--out", "{head}"), "start and out are both {head}: name another folder for the new head"),
        (("--start", "{foreign}"), "start is {foreign}, which `train-head` did not write"),
        (("--start", "nowhere"), "there is no draft head 'nowhere': name the folder of a head"),
        (("--start", "smollm2-135m"), "is a head for smollm2-135m and cannot draft for"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_a_start_that_cannot_be_is_one_sentence(
    options: tuple[str, ...],
    reason: str,
    command_line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Guards against a head that loses its own embeddings, or is overwritten, and options that are passed over."""
    target = load(command_line[2], device="cpu")
    folders = {"head": write_head(target, tmp_path / "own"), "foreign": write_head(target, tmp_path / "foreign")}
    (folders["foreign"] / OWN).unlink()
    given = [option.format(**folders) for option in options]
    out = ("--out", str(tmp_path / "new"), "--start", str(folders["head"]))
    assert exit_code(monkeypatch, *command_line, *out, *given) == 2
    assert reason.format(**folders) in " ".join(capfd.readouterr().err.split())
    assert not [*tmp_path.glob("new*/*")]  # no hidden states, and no head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "{file}"), "file, which is a file: a head is a folder"),
        (("--layers", "one"), "layers is 'one': write numbers with commas"),
        (("--layers", "3,9"), "layers is [3, 9]: they are ascending, from 0 to 3"),
        (("--tokens", "0"), "tokens is 0: at least 1"),
        (("--epochs", "0"), "epochs is 0: at least 1"),
        (("--rate", "0"), "rate is 0.0: it must be above 0"),
        (("--data", "prose,wrong"), "no data set is named 'wrong'"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    """Guards against a traceback, or an hour of work, instead of an error message."""
    model, file = save(tmp_path / "model"), tmp_path / "file"
    file.touch()
    defaults = ("--target", str(model), "--out", str(tmp_path / "head"), "--length", "40")
    given = [argument.format(file=file) for argument in arguments]
    assert exit_code(monkeypatch, "train-head", *defaults, *given) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("specdecode: ")
    assert message in error
    assert not (tmp_path / "head-work").exists()
