"""The training of a draft head."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim.lr_scheduler import LambdaLR

from specdecode.controllers.base import FixedK
from specdecode.decoding.generate import generate
from specdecode.drafters.head import HeadDrafter
from specdecode.heads.bound import FittedHead, head_shape, output_rows, signature
from specdecode.heads.module import Head
from specdecode.models.lm import LM, decoder_layers, outputs_of
from specdecode.training.features import SHARD, Shard, read_law, read_shard

# Share of all steps in which the rate grows to its full height, and what is left of it at the end.
_WARM, _LEAST = 0.03, 0.05
# A later prediction counts for less than the one before it, which must be right for it to matter (EAGLE-3).
_DECAY = 0.8
# Of first weights where nothing is known.
_SMALL = 0.02
# Of gradients; a text of a kind not seen before is not to undo what was learnt.
_LONGEST = 1.0
# Tokens that are drafted and decoded where acceptance is measured.
_DRAFTED, _DECODED = 4, 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How a head is trained.

    Attributes:
        epochs: times that all texts are read.
        batch: texts in a step.
        ahead: tokens that are predicted from each place, the later ones from the head's own states.
        rate: of learning, at its height.
        seed: of the first weights and of the order.

    Raises:
        ValueError: a number below what can be.
    """

    epochs: int = 3
    batch: int = 2
    ahead: int = 4
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        if not self.rate > 0.0:
            raise ValueError(f"rate is {self.rate}: it must be above 0")


@dataclass(slots=True)
class Epoch:
    """What an epoch ended with.

    Attributes:
        losses: for each token ahead, in nats: the mean cross-entropy of the head's law against that part of the
            target's which it can propose.
        agreements: likewise, the share of places at which both find the same token most probable.
        acceptance: tokens committed a step on texts that were not trained on, task by task.
    """

    losses: list[float]
    agreements: list[float]
    acceptance: dict[str, float] = field(default_factory=dict)


def new_head(
    target: LM, layers: Sequence[int], tokens: Int[Tensor, " D"], text: Int[Tensor, " n"], seed: int = 0
) -> Head:
    """An untrained head that begins as the target's last layer where the weights fit: over the last features alone, as
    large as that layer knows its inputs, and with the target's own norm behind it.

    Args:
        target: loaded with backend="eager".
        layers: whose outputs it reads, ascending.
        tokens: that it can propose.
        text: of which the target shows how large the inputs of its last layer are.
        seed: of what is random.
    """
    shape = head_shape(target, layers)
    width = shape.hidden
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(shape, tokens)
        with torch.no_grad():
            head.fuse.weight.normal_(0.0, _SMALL)[:, -width:] += torch.eye(width)
            head.join.weight.normal_(0.0, _SMALL)[:, width:] += _input_size(target, text) * torch.eye(width)
    begun = head.state_dict()
    # By the names of Llama's modules and its many relatives; what others call otherwise begins at random.
    known = {f"norm.{name}": value for name, value in _final_norm(target, width)}
    if (stack := decoder_layers(target.model)) is not None:
        known |= {".".join(name.split(".")[-2:]): value for name, value in stack[-1].state_dict().items()}
    for name, value in known.items():
        if name in begun and begun[name].shape == value.shape:
            begun[name] = value.float().cpu()
    head.load_state_dict(begun)
    return head


@torch.inference_mode()
def _input_size(target: LM, text: Int[Tensor, " n"]) -> float:
    """The root mean square of what the last layer reads, in the median over tokens: some are far from all others."""
    before = signature(target).layers - 2
    if before < 0:
        return 1.0
    with outputs_of(target.model, [before]) as outputs:
        target.model(text[None].to(target.device), use_cache=False)
    size: float = outputs[0].float().square().mean(-1).sqrt().median().item()
    return size


def _final_norm(target: LM, width: int) -> list[tuple[str, Tensor]]:
    norms = [module for name, module in target.model.base_model.named_children() if "norm" in name]
    return [(name, value) for module in norms[-1:] for name, value in module.named_parameters() if len(value) == width]


def frequent_tokens(shards: Sequence[Path], count: int) -> Int[Tensor, " D"]:
    """The tokens that the target expects most in the texts of the shards, ascending; less than `count` if it does not
    expect more of them at all."""
    expected = torch.zeros(0)
    for file in shards:
        top, probs = read_law(file)
        found = torch.bincount(top.flatten(), probs.flatten())
        size = max(len(found), len(expected))
        expected = pad(expected, (0, size - len(expected))) + pad(found, (0, size - len(found)))
    best = expected.topk(min(count, int((expected > 0).sum()))).indices
    return best.sort().values


class Training:
    """A head that is being trained, and how far it has got.

    Args:
        target: whose embeddings serve; it is not trained.
        head: that is.
        shards: of `collect`.
        settings: how.
        checkpoint: where the state is kept after each shard; what is there is gone on with, if it is the same training.

    Attributes:
        epochs: that are finished.

    Raises:
        ValueError: the checkpoint is of another training.
    """

    def __init__(self, target: LM, head: Head, shards: Sequence[Path], settings: Settings, checkpoint: Path) -> None:
        self.epochs: list[Epoch] = []
        self._target, self._settings, self._shards = target, settings, list(shards)
        self._checkpoint = checkpoint
        self.head = head.to(target.device)
        self._embedding = target.model.get_input_embeddings()
        self._rows = output_rows(target, head.tokens).float()
        # A token's place among those that the head can propose; -1 for all others.
        self._place = torch.full((target.vocab_size,), -1, device=target.device)
        self._place[head.tokens] = torch.arange(len(head.tokens), device=target.device)
        total = settings.epochs * len(shards) * -(-SHARD // settings.batch)
        self._optimizer = torch.optim.AdamW(
            head.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._schedule = LambdaLR(self._optimizer, lambda step: _height(step / total))
        self._done = 0  # shards of the epoch under way
        self._sums: Tensor = torch.zeros(3, settings.ahead, dtype=torch.float64)
        self._what = {
            "settings": asdict(settings),
            "shards": [file.name for file in shards],
            "shape": asdict(head.shape),
            "tokens": head.tokens.tolist(),
        }
        if checkpoint.exists():
            self._resume()

    def run(self, on_shard: Callable[[int, int, str], None], on_epoch: Callable[[Training], dict[str, float]]) -> None:
        """Train to the end.

        Args:
            on_shard: called with the shards that were read, all that will be, and the losses of the last.
            on_epoch: called after each epoch; says what acceptance it found.
        """
        total = self._settings.epochs * len(self._shards)
        while len(self.epochs) < self._settings.epochs:
            order = random.Random(f"{self._settings.seed}/{len(self.epochs)}").sample(self._shards, len(self._shards))
            while self._done < len(order):
                losses = self._read(read_shard(order[self._done]))
                self._done += 1
                done = len(self.epochs) * len(order) + self._done
                on_shard(done, total, f"loss {' '.join(f'{loss:.3f}' for loss in losses)}")
                self._keep()
            count, losses, agreed = self._sums
            self.epochs.append(Epoch((losses / count).tolist(), (agreed / count).tolist()))
            self.epochs[-1].acceptance = on_epoch(self)
            self._done, self._sums = 0, torch.zeros_like(self._sums)
            self._keep()

    def _read(self, shard: Shard) -> list[float]:
        """One pass over a shard; the mean losses in it."""
        before = self._sums.clone()
        mixer = torch.Generator().manual_seed(len(self.epochs) * len(self._shards) + self._done)
        for texts in torch.randperm(len(shard.tokens), generator=mixer).split(self._settings.batch):
            batch = Shard(*(getattr(shard, each.name)[texts].to(self._target.device) for each in fields(Shard)))
            with self._precision():
                counts, losses, agreed = foretell(
                    self.head, self._embedding, self._rows, self._place, batch, self._settings.ahead
                )
            weights = _DECAY ** torch.arange(len(losses), device=losses.device)
            self._optimizer.zero_grad()
            (weights * losses / counts).sum().backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), _LONGEST)
            self._optimizer.step()
            self._schedule.step()
            self._sums += torch.stack([counts, losses.detach(), agreed]).cpu()
        count, losses, _ = self._sums - before
        means: list[float] = (losses / count).tolist()
        return means

    def _precision(self) -> AbstractContextManager[Any]:
        """16-bit products where the target has such: what is fast with them for the one is for the other."""
        if self._target.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self._target.device.type, torch.bfloat16)

    def _keep(self) -> None:
        scratch = self._checkpoint.with_suffix(".tmp")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "what": self._what,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "done": self._done,
            "sums": self._sums,
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        torch.save(state, scratch)
        scratch.replace(self._checkpoint)

    def _resume(self) -> None:
        try:
            state = torch.load(self._checkpoint, map_location=self._target.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{self._checkpoint} is damaged: remove it, and the training starts anew") from error
        if changed := [name for name in self._what if state["what"][name] != self._what[name]]:
            raise ValueError(
                f"{self._checkpoint} is of a training with other {', '.join(changed)}: remove it to start anew, or"
                " write another file"
            )
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._done, self._sums = state["done"], state["sums"].cpu()
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def foretell(
    head: Head,
    embedding: nn.Module,
    rows: Float[Tensor, "D H"],
    place: Int[Tensor, " V"],
    batch: Shard,
    ahead: int,
) -> tuple[Float[Tensor, " ahead"], Float[Tensor, " ahead"], Float[Tensor, " ahead"]]:
    """Let a head predict as it will when it drafts: the first token from the target's features, each later one from
    its own states behind those (training-time test, EAGLE-3, Li et al. 2025).

    At the token i with s of its own states in a row, i - s + 1 to i, it attends to the features up to i - s and to
    those states. The tokens are those of the text throughout.

    Args:
        head: that predicts.
        embedding: of the target.
        rows: of the target's output embedding, for the head's tokens.
        place: of each token of the vocabulary among the head's, -1 if it is not one of them.
        batch: the texts.
        ahead: how often.

    Returns:
        For each token ahead the places at which it is predicted, the sum of the cross-entropies there against that part
        of the target's law which the head can propose, and at how many both find the same token most probable.
    """
    embedded = embedding(batch.tokens[:, 1:]).to(rows.dtype)
    state = head.fused(batch.features[:, :-1].to(rows.dtype))
    wanted = place[batch.top[:, 1:]]
    probs = batch.probs[:, 1:].where(wanted >= 0, 0.0)
    length = embedded.shape[1]
    positions = torch.arange(1, length + 1, device=embedded.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def store(own_keys: Tensor, own_values: Tensor) -> tuple[Tensor, Tensor]:
        keys.append(own_keys)
        values.append(own_values)
        return torch.cat(keys, 2), torch.cat(values, 2)

    counts, losses, agreed = [], [], []
    for step in range(ahead):
        state = head(embedded, state, positions, store, _visible(length, step, embedded.device))
        logits = head.logits(state, rows).to(rows.dtype)
        # The first tokens of a text have not so many before them.
        counted = (positions > step).expand(wanted.shape[:2])
        entropy: Tensor = CrossEntropy.apply(logits, wanted, probs)  # type: ignore[no-untyped-call]
        counts.append(counted.sum().double())
        losses.append(entropy.where(counted, 0.0).sum().double())
        # The largest is found in a fraction of the time that its place takes.
        laid = logits.detach()
        best = (laid.gather(-1, wanted[..., :1].clamp_min(0))[..., 0] == laid.amax(-1)) & (wanted[..., 0] >= 0)
        agreed.append((best & counted).sum().double())
        state = pad(state[:, :-1], (0, 0, 1, 0))
    return torch.stack(counts), torch.stack(losses), torch.stack(agreed)


class CrossEntropy(torch.autograd.Function):
    """Of laws [..., D] given by logits, against the probabilities [..., k] of a few tokens, -1 for none: these are so
    few that the derivative is the law itself but for them, made in one pass over it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, probs: Tensor) -> Tensor:
        chosen = wanted.clamp_min(0)
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total, chosen, probs)
        entropy: Tensor = (probs * (total - logits.gather(-1, chosen))).sum(-1)
        return entropy

    @staticmethod
    def backward(ctx: Any, height: Tensor) -> tuple[Tensor, None, None]:
        logits, total, chosen, probs = ctx.saved_tensors
        weights = height[..., None] * probs
        slope = (logits - total).exp_().mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, chosen, -weights)
        return slope, None, None


def _visible(length: int, step: int, device: torch.device) -> Bool[Tensor, "n s"]:
    """Of the keys of all predictions so far, side by side, those that each token attends to."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at
    return torch.cat([behind >= step, *(behind == step - own for own in range(1, step + 1))], 1)


def _height(done: float) -> float:
    """Of the rate, as a share of its height: up in a line, down in half a cosine."""
    if done < _WARM:
        return done / _WARM
    fallen = 0.5 - 0.5 * torch.cos(torch.tensor(torch.pi * (done - _WARM) / (1 - _WARM))).item()
    return 1 - (1 - _LEAST) * fallen


def acceptance(target: LM, head: Head, prompts: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Tokens committed a step, task by task, in greedy decoding with chains of four.

    Args:
        target: that verifies.
        head: that drafts.
        prompts: by id, "TASK/NUMBER".
    """
    fitted = FittedHead(head, target)
    steps: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for name, prompt in prompts.items():
        result = generate(
            target, prompt, drafter=HeadDrafter(fitted), controller=FixedK(_DRAFTED), max_new_tokens=_DECODED
        )
        task = name.rpartition("/")[0]
        steps[task] = steps.get(task, 0) + len(result.steps)
        tokens[task] = tokens.get(task, 0) + len(result.tokens)
    return {task: tokens[task] / steps[task] for task in steps}
