"""Shards on disk: texts with the target's hidden states and distributions, the only input of a head's training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import rms_norm

from specdecode.core.errors import ModelFileError
from specdecode.models.lm import LM
from specdecode.models.recording import recorded_hidden_states
from specdecode.support.checked import mapping, read_json
from specdecode.support.files import write_whole
from specdecode.training.texts import Texts

# Most probable tokens of the target's distribution that are stored: others are too improbable to matter for a draft.
_TOP_TOKENS = 16
# Texts of a shard, and texts of one forward of the target.
SHARD_TEXTS = 256
_BATCH_TEXTS = 8
# Tokens whose logits are summed together: so few rows, each as wide as the vocabulary, fit in the processor's cache.
_SUMMED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """Texts of one length with the target's hidden states and distributions.

    Attributes:
        tokens: token ids of the texts.
        hidden_states: hidden states of each token after the selected layers, concatenated, in 16 bits. The states of
            each layer are divided by their root mean square, as a head does anyway, so that 16 bits hold the outliers.
        top: the target's k most probable next tokens at each place.
        probs: probabilities of these tokens.
    """

    tokens: Int[Tensor, "texts n"]
    hidden_states: Float[Tensor, "texts n F"]
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
    """Create the shards that a folder lacks. Existing shards stay, so a killed run loses one shard at most.

    Args:
        target: the target, loaded with backend="eager".
        texts: source of the texts.
        layers: layers of the target whose hidden states are stored.
        folder: folder of the shards.
        shards: number of shards in all.
        what: all settings that decide the contents of the shards, as plain values.
        tell: called with the number of finished texts, the number of all texts, and a name of the current work.

    Returns:
        The files of the shards.

    Raises:
        ValueError: the folder holds shards of other contents.
    """
    manifest = folder / "shards.json"
    if manifest.exists():
        stored, wanted = mapping(read_json(manifest), str(manifest)), json.loads(json.dumps(what))
        if changed := changed_keys(stored, wanted):
            raise ValueError(
                f"{folder} holds hidden states of a training with other {', '.join(sorted(changed))}: name another"
                " folder, or remove it"
            )
    write_whole(manifest, json.dumps(what, indent=1) + "\n")
    files = [folder / f"shard-{number:05}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        # Count whole shards only: the target writes more slowly than it reads, so parts would give a wrong time left.
        tell_doing = partial(tell, number * SHARD_TEXTS, shards * SHARD_TEXTS)
        tell_doing("hidden states of texts")
        if not file.exists():
            drawn = texts.draw(number, SHARD_TEXTS, tell_doing)
            write_whole(file, save(_tensors(_shard(target, drawn, layers, tell_doing))))
    return files


def changed_keys(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ in the records of two trainings. A missing key counts as None."""
    return [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]


def read_shard(file: Path) -> Shard:
    """Read a shard of `collect`.

    Raises:
        ModelFileError: the file is damaged.
    """
    tokens, hidden_states, top, probs = _read(file, "tokens", "features", "top", "probs")
    return Shard(tokens.long(), hidden_states, top.long(), probs.float())


def read_distributions(file: Path) -> tuple[Int[Tensor, "texts n k"], Float[Tensor, "texts n k"]]:
    """Read the most probable tokens of a shard and their probabilities, without its hidden states. The hidden states
    are most of its bytes.

    Raises:
        ModelFileError: the file is damaged.
    """
    top, probs = _read(file, "top", "probs")
    return top.long(), probs.float()


def _read(file: Path, *names: str) -> list[Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return [opened.get_tensor(name) for name in names]
    except Exception as error:
        raise ModelFileError(f"{file} is damaged: remove it, and run again to create it anew") from error


def _tensors(shard: Shard) -> dict[str, Tensor]:
    """Return the tensors of a shard's file."""
    return {
        "tokens": shard.tokens.int(),
        "features": shard.hidden_states,
        "top": shard.top.int(),
        "probs": shard.probs.half(),
    }


@torch.inference_mode()
def _shard(target: LM, texts: Sequence[Sequence[int]], layers: Sequence[int], tell: Callable[[str], None]) -> Shard:
    """Run the target over whole texts, without a cache because nothing is decoded; return their shard.

    `tell` gets a name of the current work.
    """
    tokens = torch.tensor(texts)
    hidden_states, top, probs = [], [], []
    for batch in tokens.split(_BATCH_TEXTS):
        with recorded_hidden_states(target.model, layers) as by_layer:
            logits = target.model(batch.to(target.device), use_cache=False).logits
        normalised = [rms_norm(states.float(), (states.shape[-1],)).half() for states in by_layer]
        hidden_states.append(torch.cat(normalised, -1).cpu())
        best = logits.topk(_TOP_TOKENS)
        total = torch.cat([rows.float().logsumexp(-1) for rows in logits.flatten(0, 1).split(_SUMMED_ROWS)])
        top.append(best.indices.cpu())
        probs.append((best.values.float() - total.view(*batch.shape, 1)).exp().cpu())
        tell(f"hidden states of {len(texts)} texts, {sum(map(len, top))} finished")
    return Shard(tokens, torch.cat(hidden_states), torch.cat(top), torch.cat(probs))
