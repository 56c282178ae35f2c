"""The training of a draft head over the shards of its texts, with a checkpoint after each shard."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from specdecode.heads.bound import output_rows
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import describe
from specdecode.models.lm import LM
from specdecode.support.files import whole
from specdecode.training.loss import predict_ahead
from specdecode.training.shards import SHARD_TEXTS, Shard, changed_keys, read_shard

# Share of all steps in which the learning rate rises, and final learning rate as a share of its peak.
_WARMUP_SHARE, _FINAL_RATE_SHARE = 0.03, 0.05
# Weight of a prediction relative to the previous prediction, which must be right for this one to count (EAGLE-3).
_LATER_PREDICTION_WEIGHT = 0.8
# Clips the gradient, so that one unusual text cannot undo earlier learning.
_GRADIENT_NORM_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The settings of a training.

    Attributes:
        epochs: number of passes over all texts.
        batch: texts in a step.
        ahead: number of tokens predicted from each place, the later ones from the head's own states.
        rate: peak of the learning rate.
        seed: seed of the initial weights and of the order of texts.

    Raises:
        ValueError: a number that is too small or too large.
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: from 0 to {2**32 - 1}")
        if not self.rate > 0.0:
            raise ValueError(f"rate is {self.rate}: it must be above 0")


@dataclass(slots=True)
class Epoch:
    """The measures of one epoch.

    Attributes:
        losses: mean cross-entropy for each token ahead, in nats: of the head's distribution against the target's,
            restricted to the tokens that the head can propose.
        agreements: share of places, for each token ahead, where head and target have the same most probable token.
        acceptance: mean acceptance length on held-out texts, by task.
    """

    losses: list[float]
    agreements: list[float]
    acceptance: dict[str, float] = field(default_factory=dict)


class Trainer:
    """The training of a head, with its state in a checkpoint.

    Args:
        target: the target, whose embeddings the head uses. The target is not trained.
        head: the head to train.
        shards: files of the shards, from `collect`.
        settings: settings of the training.
        checkpoint: file of the state, written after each shard. If it exists, the training continues from it.
        start: digest of the weights that the head has at first, if they are of an earlier training.

    Attributes:
        head: the head in its current state, on the target's device.
        epochs: measures of the finished epochs.

    Raises:
        ValueError: the checkpoint is of another training, or damaged.
    """

    def __init__(
        self,
        target: LM,
        head: Eagle3Head,
        shards: Sequence[Path],
        settings: TrainingSettings,
        checkpoint: Path,
        start: str | None = None,
    ) -> None:
        self.epochs: list[Epoch] = []
        self._target, self._settings, self._shards = target, settings, list(shards)
        self._checkpoint = checkpoint
        self.head = head.to(target.device)
        self._embedding = target.model.get_input_embeddings()
        self._rows = output_rows(target, head.tokens).float()
        # Index of each token among the head's tokens; -1 for all others.
        self._place = torch.full((target.vocab_size,), -1, device=target.device)
        self._place[head.tokens] = torch.arange(len(head.tokens), device=target.device)
        total = settings.epochs * len(shards) * -(-SHARD_TEXTS // settings.batch)
        self._optimizer = torch.optim.AdamW(
            head.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self._optimizer, round(_WARMUP_SHARE * total), total, min_lr_rate=_FINAL_RATE_SHARE
        )
        self._shards_done = 0  # of the current epoch
        self._sums: Tensor = torch.zeros(3, settings.ahead, dtype=torch.float64)
        self._identity = {
            "settings": asdict(settings),
            "shards": [file.name for file in shards],
            "shape": describe(head.shape),
            "tokens": head.tokens.tolist(),
            "start": start,
        }
        if checkpoint.exists():
            self._resume()

    def run(self, tell: Callable[[int, int, str], None], on_epoch: Callable[[Trainer], dict[str, float]]) -> None:
        """Train to the end.

        Args:
            tell: called after each step with the number of texts read, the number of all texts to read, and the loss of
                the step as text. A text counts once in each epoch.
            on_epoch: called after each epoch; returns the `acceptance` of the epoch.
        """
        total = self._settings.epochs * len(self._shards) * SHARD_TEXTS
        while len(self.epochs) < self._settings.epochs:
            order = random.Random(f"{self._settings.seed}/{len(self.epochs)}").sample(self._shards, len(self._shards))
            while self._shards_done < len(order):
                done = (len(self.epochs) * len(order) + self._shards_done) * SHARD_TEXTS
                for texts, loss in self._train_on(read_shard(order[self._shards_done])):
                    done += texts
                    tell(done, total, f"training, loss {loss:.3f}")
                self._shards_done += 1
                self._save()
            count, losses, agreed = self._sums
            self.epochs.append(Epoch((losses / count).tolist(), (agreed / count).tolist()))
            self.epochs[-1].acceptance = on_epoch(self)
            self._shards_done, self._sums = 0, torch.zeros_like(self._sums)
            self._save()

    def _train_on(self, shard: Shard) -> Iterator[tuple[int, float]]:
        """Train on all texts of a shard once. Yield, after each step, its texts and the mean loss of the next token."""
        number = len(self.epochs) * len(self._shards) + self._shards_done
        mixer = torch.Generator().manual_seed(number + (self._settings.seed << 32))
        for texts in torch.randperm(len(shard.tokens), generator=mixer).split(self._settings.batch):
            batch = Shard(*(getattr(shard, column.name)[texts].to(self._target.device) for column in fields(Shard)))
            with self._precision():
                counts, losses, agreed = predict_ahead(
                    self.head, self._embedding, self._rows, self._place, batch, self._settings.ahead
                )
            weights = _LATER_PREDICTION_WEIGHT ** torch.arange(len(losses), device=losses.device)
            self._optimizer.zero_grad()
            (weights * losses / counts).sum().backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), _GRADIENT_NORM_CLIP)
            self._optimizer.step()
            self._schedule.step()
            step = torch.stack([counts, losses.detach(), agreed]).cpu()
            self._sums += step
            yield len(texts), (step[1, 0] / step[0, 0]).item()  # from the copy: the device is not asked again

    def _precision(self) -> AbstractContextManager[Any]:
        """Return a context with 16-bit products if the target has 16-bit weights, else an empty context. A device that
        is fast with 16-bit weights is fast with 16-bit products."""
        if self._target.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self._target.device.type, torch.bfloat16)

    def _save(self) -> None:
        state = {
            "what": self._identity,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "done": self._shards_done,
            "sums": self._sums,
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        with whole(self._checkpoint) as scratch:
            torch.save(state, scratch)

    def _resume(self) -> None:
        try:
            state = torch.load(self._checkpoint, map_location=self._target.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{self._checkpoint} is damaged: remove it to start the training anew") from error
        if changed := changed_keys(state["what"], self._identity):
            raise ValueError(
                f"{self._checkpoint} is of a training with other {', '.join(changed)}: remove it to start anew, or"
                " name another folder for the head"
            )
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._shards_done, self._sums = state["done"], state["sums"].cpu()
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
