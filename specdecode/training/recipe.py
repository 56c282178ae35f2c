"""The recipe of a draft head, and its training: `specdecode train-head`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdecode.controllers.base import FixedK
from specdecode.decoding.generate import generate
from specdecode.drafters.head import HeadDrafter
from specdecode.heads.bound import BoundHead, head_shape, output_rows, target_sizes
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import write_eagle3
from specdecode.heads.fingerprint import target_fingerprint
from specdecode.models.embedded import weights_of
from specdecode.models.lm import LM
from specdecode.support.environment import environment
from specdecode.support.git import git
from specdecode.training.initial_head import earlier_head, frequent_tokens, initial_head
from specdecode.training.shards import SHARD_TEXTS, collect, read_shard
from specdecode.training.texts import ASK, CHAT, Texts
from specdecode.training.trainer import Epoch, Trainer, TrainingSettings

# Held-out documents of each data set on which acceptance is measured after each epoch.
_PROMPTS_PER_SET = 4
# Tokens of their prompts, new tokens, and length of the draft chains.
_PROMPT_TOKENS, _NEW_TOKENS, _DRAFT_LENGTH = 64, 64, 4
# Tokens that a head can propose, by default.
_VOCABULARY = 8192
# Elements of each weight in the digest of the weights, at least; all if there are fewer.
_DIGEST_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class Recipe:
    """The texts, the layers and the settings of a head's training.

    Attributes:
        data: data sets with documents, see `evals.data`, and "chat" and "ask", see `training.texts`.
        tokens: number of tokens to train on, rounded up to whole shards.
        length: tokens of a text.
        own: share of the corpus texts that the target continues itself.
        held_out: number of documents of each data set that are left out, the first in their order.
        start: a head of an earlier training of this package, to train further; as for `load_head`. By default the head
            begins as the target's last layer.
        layers: layers of the target whose hidden states the head reads; by default one near the beginning, the middle
            one and the last. A head of an earlier training keeps its own.
        vocabulary: most tokens that the head can propose, by default 8192. A head of an earlier training keeps its own.
        shared_output: whether the folder leaves out the output embedding, which is the target's. The folder is then
            smaller, and only this package can read it.
        settings: settings of the training.

    Raises:
        ValueError: a number below 1, or layers or a vocabulary besides a head of an earlier training.
    """

    data: tuple[str, ...] = ("code", "prose", CHAT, ASK)
    tokens: int = 1_000_000
    length: int = 256
    own: float = 0.5
    held_out: int = 20
    start: str | None = None
    layers: tuple[int, ...] = ()
    vocabulary: int | None = None
    shared_output: bool = False
    settings: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "held_out", "vocabulary"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}: at least 1")
        for name in ("layers", "vocabulary"):
            if self.start and getattr(self, name):
                raise ValueError(f"{name} is of no use with start: the head {self.start} keeps its own")


def train_head(
    target: LM, name: str, recipe: Recipe, out: Path, command: str, tell: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Collect shards, train, and write the head and its card. A killed run continues from its last checkpoint.

    The folder `work_folder(out)` holds the shards and the checkpoint. It can be removed when the head is written.

    Args:
        target: the target, loaded with backend="eager".
        name: name under which the target was loaded.
        recipe: texts, layers and settings of the training.
        out: the folder of the head, in the format of `speculators`.
        command: command that repeats this run.
        tell: called with the number of finished texts, the number of all texts, and a name of the current work.

    Returns:
        The card.

    Raises:
        ValueError, SpecDecodeError: a data set is not available, the target has no such layer, or the folder holds the
            work of another training.
    """
    total, _ = target_sizes(target)
    start = earlier_head(recipe.start, target) if recipe.start else None
    layers = recipe.layers or (start.head.shape.layers if start else _default_layers(total))
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
        raise ValueError(f"layers is {list(layers)}: they are ascending, from 0 to {total - 1}")
    settings, work = recipe.settings, work_folder(out)
    # Faults of the target and of the data sets raise here, before long work.
    head_shape(target, layers)
    texts = Texts(target, recipe.data, recipe.length, own=recipe.own, held_out=recipe.held_out, seed=settings.seed)
    held_out = [document for documents in texts.held_out.values() for document in documents[:_PROMPTS_PER_SET]]
    prompts = {document.id: target.encode(document.text)[:_PROMPT_TOKENS] for document in held_out}
    shards = -(-recipe.tokens // (SHARD_TEXTS * recipe.length))
    what = {
        "target": name,
        "weights": weights_of(name),
        "dtype": str(target.dtype).removeprefix("torch."),
        "layers": layers,
        "digest": f"{_digest(target)} of the weights, {texts.digest} of the texts",
        "texts": texts.origins,
        **{key: value for key, value in asdict(recipe).items() if key in ("data", "length", "own", "held_out")},
        "seed": settings.seed,
    }
    files = collect(target, texts, layers, work, shards, what, tell)
    if start:
        trainer = Trainer(target, start.head, files, settings, work / "checkpoint.pt", start.digest)
    else:
        vocabulary = frequent_tokens(files, recipe.vocabulary or _VOCABULARY)
        head = initial_head(target, layers, vocabulary, read_shard(files[0]).tokens[0], settings.seed)
        trainer = Trainer(target, head, files, settings, work / "checkpoint.pt")

    def on_epoch(trainer: Trainer) -> dict[str, float]:
        epochs = len(trainer.epochs)
        # Progress is counted in texts.
        read, total = (count * shards * SHARD_TEXTS for count in (epochs, settings.epochs))
        tell(read, total, f"epoch {epochs}: drafting for {len(prompts)} held-out texts")
        acceptance = acceptance_lengths(target, trainer.head, prompts)
        tell(read, total, f"epoch {epochs}: {_line(trainer.epochs[-1], acceptance)}")
        return acceptance

    trainer.run(tell, on_epoch)
    card = {
        **what,
        "tokens": shards * SHARD_TEXTS * recipe.length,
        "vocabulary": len(trainer.head.tokens),
        "settings": asdict(settings),
        "epochs": [asdict(epoch) for epoch in trainer.epochs],
        "command": command,
        "commit": _commit(),
        "environment": environment(),
        **({"start": {"head": start.name, "digest": start.digest, "card": start.card}} if start else {}),
    }
    rows = None if recipe.shared_output else output_rows(target, trainer.head.tokens)
    architectures = target.model.config.architectures or [type(target.model).__name__]
    write_eagle3(out, trainer.head, rows, target_fingerprint(target), architectures, card, _page(card))
    return card


def _default_layers(total: int) -> tuple[int, ...]:
    return tuple(sorted({min(2, total - 1), total // 2, total - 1}))


def work_folder(out: Path) -> Path:
    """Return the folder of a training's shards and checkpoint, beside the folder of its head."""
    return out.with_name(f"{out.name}-work")


def acceptance_lengths(target: LM, head: Eagle3Head, prompts: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return the mean acceptance length by task, under greedy decoding with chains of four.

    Args:
        target: model that verifies.
        head: head that drafts.
        prompts: token ids by prompt id, "TASK/NUMBER".
    """
    bound = BoundHead(head, target)
    steps: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for name, prompt in prompts.items():
        drafter, controller = HeadDrafter(bound), FixedK(_DRAFT_LENGTH)
        result = generate(target, prompt, drafter=drafter, controller=controller, max_new_tokens=_NEW_TOKENS)
        task = name.rpartition("/")[0]
        steps[task] = steps.get(task, 0) + len(result.steps)
        tokens[task] = tokens.get(task, 0) + len(result.tokens)
    return {task: tokens[task] / steps[task] for task in steps}


def _commit() -> str:
    try:
        return git("rev-parse", "HEAD").strip()
    except ValueError:
        return "not known: not in a checkout"


def _digest(target: LM) -> str:
    """Return a digest of elements of each of the target's weights: a folder may hold others than before."""
    digest = hashlib.sha256()
    for weight in target.model.parameters():
        elements = weight.detach().flatten()
        digest.update(elements[:: max(len(elements) // _DIGEST_ELEMENTS, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _line(epoch: Epoch, acceptance: dict[str, float]) -> str:
    """Return the measures of an epoch in one line."""
    losses = " ".join(f"{loss:.3f}" for loss in epoch.losses)
    agreed = " ".join(f"{share:.0%}" for share in epoch.agreements)
    tau = ", ".join(f"{task} {value:.2f}" for task, value in acceptance.items())
    return f"loss {losses}; same token {agreed}; tokens a step {tau}"


def _page(card: Mapping[str, Any]) -> str:
    """Return the card as a Markdown page, with the cards of earlier trainings."""
    origins = "; ".join(f"{name}: {origin}" for name, origin in card["texts"].items())
    lines = [
        f"# A draft head for {card['target']}",
        "",
        f"Reads the layers {', '.join(map(str, card['layers']))} of the target (weights: {card['weights']}) and"
        f" proposes {card['vocabulary']} tokens. Trained in {card['dtype']} on {card['tokens']} tokens in texts of"
        f" {card['length']}: {', '.join(card['data'])} ({origins}). The target continued {card['own']:.0%} of the"
        f" corpus texts itself. The first {card['held_out']} documents of each corpus are not in these texts.",
        "",
        "For each epoch it lists, for each token ahead: the loss (nats), and the share of places where head and target"
        " have the same most probable token. Then the tokens committed a step on held-out texts (greedy, chains of 4).",
        "",
        *_training(card),
    ]
    while start := card.get("start"):
        card = start["card"]
        lines += ["", f"It began as the head {start['head']}, which was trained before:", "", *_training(card)]
    return "\n".join(lines) + "\n"


def _training(card: Mapping[str, Any]) -> list[str]:
    """Return the command, the settings and the epochs of a training as lines of Markdown."""
    settings = card["settings"]
    versions = ", ".join(f"{name} {value}" for name, value in card["environment"].items())
    epochs = [Epoch(**epoch) for epoch in card["epochs"]]
    return [
        f"    {card['command']}",
        "",
        f"Commit {card['commit']}; seed {card['seed']}; {settings['epochs']} epochs in batches of {settings['batch']}"
        f" texts, {settings['ahead']} tokens ahead, rate {settings['rate']}. {versions}.",
        "",
        *(f"{number}. {_line(epoch, epoch.acceptance)}" for number, epoch in enumerate(epochs, start=1)),
    ]
