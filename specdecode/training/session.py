"""From a target's name to the file of a head: `specdecode train-head`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdecode.heads.bound import signature
from specdecode.heads.formats import write_head
from specdecode.models.embedded import weights_of
from specdecode.models.lm import LM
from specdecode.support.environment import environment
from specdecode.support.files import write_whole
from specdecode.support.git import git
from specdecode.training.features import SHARD, collect, read_shard
from specdecode.training.heads import Epoch, Settings, Training, acceptance, frequent_tokens, new_head
from specdecode.training.texts import ASK, CHAT, Texts

# Of each held-out document what stands before the tokens with which acceptance is measured, and how many of a data set
# are decoded after each epoch.
_PROMPT, _PROMPTS = 64, 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a head is trained on.

    Attributes:
        data: data sets with documents, see `evals.data`, and "chat" and "ask", see `training.texts`.
        tokens: to train on, rounded up to whole shards.
        length: of a text.
        own: share of the corpus texts that the target writes on by itself.
        held_out: documents of each data set that are left out, the first in their order.
        layers: of the target, whose outputs the head reads; by default one near the beginning, the middle one and the
            last.
        vocabulary: tokens that it can propose.
        settings: how it is trained.

    Raises:
        ValueError: a number below 1.
    """

    data: tuple[str, ...] = ("code", "prose", CHAT, ASK)
    tokens: int = 1_000_000
    length: int = 256
    own: float = 0.5
    held_out: int = 20
    layers: tuple[int, ...] = ()
    vocabulary: int = 8192
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "held_out", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")


def train_head(
    target: LM, name: str, recipe: Recipe, out: Path, command: str, tell: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Collect, train, and write the head and its card; a run that was killed goes on where it was.

    Beside `out` stands a folder of the same name with the features and the state of the training, which can be removed
    when the head is there.

    Args:
        target: loaded with backend="eager".
        name: by which it was loaded.
        recipe: what is trained on, and how.
        out: the file, .safetensors; the card is written beside it in Markdown.
        command: that does this again.
        tell: called with what is done, all of it, and what is being done.

    Returns:
        The card.

    Raises:
        ValueError, SpecDecodeError: a data set that is not at hand, a layer that the target does not have, or a folder
            with the work of another training.
    """
    total = signature(target).layers
    layers = recipe.layers or tuple(sorted({min(2, total - 1), total // 2, total - 1}))
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
        raise ValueError(f"layers is {list(layers)}: they are ascending, from 0 to {total - 1}")
    settings, work = recipe.settings, out.with_suffix("")
    # Before anything that takes long: whatever cannot be had is said now.
    texts = Texts(target, recipe.data, recipe.length, own=recipe.own, held_out=recipe.held_out, seed=settings.seed)
    held_out = [each for part in texts.held_out.values() for each in part[:_PROMPTS]]
    prompts = {each.id: target.encode(each.text)[:_PROMPT] for each in held_out}
    shards = -(-recipe.tokens // (SHARD * recipe.length))
    what = {
        "target": name,
        "weights": weights_of(name),
        "dtype": str(target.dtype).removeprefix("torch."),
        "layers": layers,
        "texts": texts.origins,
        **{key: value for key, value in asdict(recipe).items() if key in ("data", "length", "own", "held_out")},
        "seed": settings.seed,
    }
    files = collect(target, texts, layers, work, shards, what, tell)
    proposed = frequent_tokens(files, recipe.vocabulary)
    head = new_head(target, layers, proposed, read_shard(files[0]).tokens[0], settings.seed)
    training = Training(target, head, files, settings, work / "checkpoint.pt")

    def on_epoch(training: Training) -> dict[str, float]:
        found = acceptance(target, training.head, prompts)
        ended = len(training.epochs)
        # In shards, as everything before it.
        tell(ended * shards, settings.epochs * shards, f"epoch {ended}: {_line(training.epochs[-1], found)}")
        return found

    training.run(tell, on_epoch)
    card = {
        **what,
        "tokens": shards * SHARD * recipe.length,
        "vocabulary": len(head.tokens),
        "settings": asdict(settings),
        "epochs": [asdict(epoch) for epoch in training.epochs],
        "command": command,
        "commit": _commit(),
        "environment": environment(),
    }
    write_whole(out, write_head(training.head, signature(target), card))
    write_whole(out.with_suffix(".md"), _card(card, training.epochs))
    return card


def _commit() -> str:
    try:
        return git("rev-parse", "HEAD").strip()
    except ValueError:
        return "not known: not in a checkout"


def _line(epoch: Epoch, found: dict[str, float]) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in epoch.losses)
    agreed = " ".join(f"{share:.0%}" for share in epoch.agreements)
    tau = ", ".join(f"{task} {value:.2f}" for task, value in found.items())
    return f"loss {losses}; same token {agreed}; tokens a step {tau}"


def _card(card: dict[str, Any], epochs: list[Epoch]) -> str:
    """The card as a page."""
    settings = card["settings"]
    origins = "; ".join(f"{name}: {origin}" for name, origin in card["texts"].items())
    versions = ", ".join(f"{name} {value}" for name, value in card["environment"].items())
    lines = [
        f"# A draft head for {card['target']}",
        "",
        f"Reads the layers {', '.join(map(str, card['layers']))} of the target (weights: {card['weights']}) and"
        f" proposes {card['vocabulary']} tokens. Trained in {card['dtype']} on {card['tokens']} tokens in texts of"
        f" {card['length']}: {', '.join(card['data'])} ({origins}), of the corpora {card['own']:.0%} written on by the"
        f" target. The first {card['held_out']} documents of each were never trained on.",
        "",
        f"    {card['command']}",
        "",
        f"Commit {card['commit']}; seed {card['seed']}; {settings['epochs']} epochs in batches of {settings['batch']}"
        f" texts, {settings['ahead']} tokens ahead, rate {settings['rate']}. {versions}.",
        "",
        "After each epoch: for each token ahead the loss (nats) and the share of places with the target's own first"
        " choice; and the tokens committed a step on held-out texts (greedy, chains of 4).",
        "",
        *(f"{number}. {_line(epoch, epoch.acceptance)}" for number, epoch in enumerate(epochs, start=1)),
    ]
    return "\n".join(lines) + "\n"
