"""What a target makes of texts, on disk: all that the training of a head needs of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import rms_norm

from specdecode.core.errors import ModelFileError
from specdecode.models.lm import LM, outputs_of
from specdecode.support.files import write_whole
from specdecode.training.texts import Texts

# Of the target's law at each token, the most probable ones: what lies beyond is far below what a draft could gain.
_TOP = 16
# Texts in a shard, and in one forward of the target.
SHARD = 256
_BATCH = 8
# Tokens whose logits are added up at a time: a vocabulary of numbers for each of them stays in the processor's cache.
_ROWS = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """Texts of one length with what the target says of them.

    Attributes:
        tokens: of the texts.
        features: of each token, the outputs of the chosen layers side by side, in 16 bit; each layer's is divided by
            its root mean square, which a head does anyway, so that no layer's outliers are beyond what 16 bits hold.
        top: the tokens that the target finds most probable next.
        probs: their probabilities.
    """

    tokens: Int[Tensor, "texts n"]
    features: Float[Tensor, "texts n F"]
    top: Int[Tensor, "texts n k"]
    probs: Float[Tensor, "texts n k"]


def collect(
    target: LM,
    texts: Texts,
    layers: Sequence[int],
    folder: Path,
    shards: int,
    what: dict[str, Any],
    tell: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> list[Path]:
    """Make the shards that a folder lacks; those that are there stay, so that a killed run loses one at most.

    Args:
        target: loaded with backend="eager".
        texts: that are drawn.
        layers: of the target, whose outputs are the features.
        folder: of the shards.
        shards: how many there are to be.
        what: all that decides what is in them, as plain values.
        tell: called with the shards that are there, all, and what is being done.

    Raises:
        ValueError: the folder holds shards of something else.
    """
    manifest = folder / "shards.json"
    if manifest.exists():
        there = json.loads(manifest.read_text(encoding="utf-8"))
        if changed := [key for key in {**there, **what} if there.get(key) != json.loads(json.dumps(what)).get(key)]:
            raise ValueError(
                f"{folder} holds features for another {', '.join(sorted(changed))}: name another folder, or remove it"
            )
    write_whole(manifest, json.dumps(what, indent=1) + "\n")
    files = [folder / f"shard-{number:05}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        tell(number, shards, "features of texts")
        if not file.exists():
            write_whole(file, save(_plain(_shard(target, texts.draw(number, SHARD), layers))))
    return files


def read_shard(file: Path) -> Shard:
    """A shard of `collect`.

    Raises:
        ModelFileError: it is damaged.
    """
    tokens, features, top, probs = _held(file, "tokens", "features", "top", "probs")
    return Shard(tokens.long(), features, top.long(), probs.float())


def read_law(file: Path) -> tuple[Int[Tensor, "texts n k"], Float[Tensor, "texts n k"]]:
    """The most probable tokens of a shard and their probabilities, without its features, which are nearly all of it.

    Raises:
        ModelFileError: it is damaged.
    """
    top, probs = _held(file, "top", "probs")
    return top.long(), probs.float()


def _held(file: Path, *names: str) -> list[Tensor]:
    try:
        with safe_open(file, framework="pt") as held:
            return [held.get_tensor(name) for name in names]
    except Exception as error:
        raise ModelFileError(f"{file} is damaged: remove it, and it is made again") from error


def _plain(shard: Shard) -> dict[str, Tensor]:
    return {
        "tokens": shard.tokens.int(),
        "features": shard.features,
        "top": shard.top.int(),
        "probs": shard.probs.half(),
    }


@torch.inference_mode()
def _shard(target: LM, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Shard:
    """A whole text in one forward: a text is followed here, not decoded, so that no cache and no tree is needed."""
    tokens = torch.tensor(texts)
    features, top, probs = [], [], []
    for batch in tokens.split(_BATCH):
        with outputs_of(target.model, layers) as outputs:
            logits = target.model(batch.to(target.device), use_cache=False).logits
        features.append(torch.cat([rms_norm(out.float(), (out.shape[-1],)).half() for out in outputs], -1).cpu())
        best = logits.topk(_TOP)
        total = torch.cat([some.float().logsumexp(-1) for some in logits.flatten(0, 1).split(_ROWS)])
        top.append(best.indices.cpu())
        probs.append((best.values.float() - total.view(*batch.shape, 1)).exp().cpu())
    return Shard(tokens, torch.cat(features), torch.cat(top), torch.cat(probs))
