"""The training of a draft head over the shards of its texts, with a checkpoint after each shard."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from specdecode.heads.bound import output_rows
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import describe
from specdecode.models.lm import LM
from specdecode.support.files import whole
from specdecode.training.loss import predict_ahead
from specdecode.training.shards import SHARD_TEXTS, Shard, read_shard

# Share of all steps in which the learning rate rises, and the share of its peak that is left at the end.
_WARMUP_SHARE, _FINAL_RATE_SHARE = 0.03, 0.05
# Weight of a later prediction relative to the one before it, which must be right for it to matter (EAGLE-3).
_LATER_PREDICTION_WEIGHT = 0.8
# A text of an unusual kind must not undo what was learnt.
_GRADIENT_NORM_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Hold the settings of a training.

    Attributes:
        epochs: times that all texts are read.
        batch: texts in a step.
        ahead: tokens that are predicted from each place, the later ones from the head's own states.
        rate: peak of the learning rate.
        seed: of the initial weights and of the order of texts.

    Raises:
        ValueError: a number that is too small.
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
    """Hold the measures of one epoch.

    Attributes:
        losses: for each token ahead, in nats, the mean cross-entropy of the head's distribution against the part of the
            target's that the head can propose.
        agreements: for each token ahead, the share of places where both have the same most probable token.
        acceptance: mean acceptance length on texts that were not trained on, by task.
    """

    losses: list[float]
    agreements: list[float]
    acceptance: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Train a head, and keep its state in a checkpoint.

    Args:
        target: whose embeddings serve; it is not trained.
        head: to train.
        shards: of `collect`.
        settings: of the training.
        checkpoint: the file that keeps the state after each shard. If it exists, the training continues from it.

    Attributes:
        head: as trained so far, on the target's device.
        epochs: that are finished.

    Raises:
        ValueError: the checkpoint is of another training, or damaged.
    """

    def __init__(
        self, target: LM, head: Eagle3Head, shards: Sequence[Path], settings: TrainingSettings, checkpoint: Path
    ) -> None:
        self.epochs: list[Epoch] = []
        self._target, self._settings, self._shards = target, settings, list(shards)
        self._checkpoint = checkpoint
        self.head = head.to(target.device)
        self._embedding = target.model.get_input_embeddings()
        self._rows = output_rows(target, head.tokens).float()
        # A token's place among those that the head can propose; -1 for all others.
        self._place = torch.full((target.vocab_size,), -1, device=target.device)
        self._place[head.tokens] = torch.arange(len(head.tokens), device=target.device)
        total = settings.epochs * len(shards) * -(-SHARD_TEXTS // settings.batch)
        self._optimizer = torch.optim.AdamW(
            head.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._schedule = LambdaLR(self._optimizer, lambda step: _rate_share(step / total))
        self._shards_done = 0  # of the current epoch
        self._sums: Tensor = torch.zeros(3, settings.ahead, dtype=torch.float64)
        self._identity = {
            "settings": asdict(settings),
            "shards": [file.name for file in shards],
            "shape": describe(head.shape),
            "tokens": head.tokens.tolist(),
        }
        if checkpoint.exists():
            self._resume()

    def run(self, on_shard: Callable[[int, int, str], None], on_epoch: Callable[[Trainer], dict[str, float]]) -> None:
        """Train to the end.

        Args:
            on_shard: called with the number of shards read, of all that will be read, and the losses in the last one.
            on_epoch: called after each epoch; returns the `acceptance` of the epoch.
        """
        total = self._settings.epochs * len(self._shards)
        while len(self.epochs) < self._settings.epochs:
            order = random.Random(f"{self._settings.seed}/{len(self.epochs)}").sample(self._shards, len(self._shards))
            while self._shards_done < len(order):
                losses = self._train_on(read_shard(order[self._shards_done]))
                self._shards_done += 1
                done = len(self.epochs) * len(order) + self._shards_done
                on_shard(done, total, f"loss {' '.join(f'{loss:.3f}' for loss in losses)}")
                self._save()
            count, losses, agreed = self._sums
            self.epochs.append(Epoch((losses / count).tolist(), (agreed / count).tolist()))
            self.epochs[-1].acceptance = on_epoch(self)
            self._shards_done, self._sums = 0, torch.zeros_like(self._sums)
            self._save()

    def _train_on(self, shard: Shard) -> list[float]:
        """Train on all texts of a shard once; return the mean losses."""
        before = self._sums.clone()
        mixer = torch.Generator().manual_seed(len(self.epochs) * len(self._shards) + self._shards_done)
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
            self._sums += torch.stack([counts, losses.detach(), agreed]).cpu()
        count, losses, _ = self._sums - before
        means: list[float] = (losses / count).tolist()
        return means

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the context of 16-bit products if the target has 16-bit weights: a device fast at one is at both."""
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
            raise ValueError(f"{self._checkpoint} is damaged: remove it, and the training starts anew") from error
        if changed := [name for name in self._identity if state["what"][name] != self._identity[name]]:
            raise ValueError(
                f"{self._checkpoint} is of a training with other {', '.join(changed)}: remove it to start anew, or"
                " write another file"
            )
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._shards_done, self._sums = state["done"], state["sums"].cpu()
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def _rate_share(progress: float) -> float:
    """Return the learning rate as a share of its peak: it rises linearly and falls along half a cosine."""
    if progress < _WARMUP_SHARE:
        return progress / _WARMUP_SHARE
    fallen = 0.5 - 0.5 * torch.cos(torch.tensor(torch.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE))).item()
    return 1 - (1 - _FINAL_RATE_SHARE) * fallen
