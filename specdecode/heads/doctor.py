"""Find out whether a head is wired as it was trained: whether another wiring of its weights accepts more.

A head whose files say another wiring than the one that it was trained with drafts on, and accepts less in silence. Its
proposals are compared with the target's own text at every place, read as in drafting: a proposal at depth d counts as
accepted if it and all before it are the text's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor
from torch.nn.functional import pad

from specdecode.core.errors import ModelFileError, UnsupportedModelError
from specdecode.heads.bound import BoundHead, target_sizes
from specdecode.heads.eagle3_files import FLAGS, IDS, Eagle3Files, make_eagle3
from specdecode.heads.module import visible_ahead
from specdecode.models.forwards import ForwardInput
from specdecode.models.lm import LM
from specdecode.models.recording import recorded_hidden_states
from specdecode.models.variants import final_norm

DEPTH = 4
"""Tokens of a draft."""

# Chance of an alarm at a head that is wired as trained, over all wirings together.
_FALSE_ALARMS = 0.01
# Another wiring must accept so many more tokens a step, and this share more, to be worth a change.
_LEAST_GAIN, _LEAST_SHARE = 0.05, 0.02
# The tensors that a flag brings.
_NORMS = {"norm_before_fc": "input_norm.", "fc_norm": "fc_norm."}


@dataclass(frozen=True, slots=True)
class Wiring:
    """Hold one way to wire a head's weights.

    Attributes:
        name: of what differs from the head's own files; empty for these.
        change: what to change in the files, as the rest of a sentence.
        files: of the head in this wiring.
        normed: the last layer's hidden states are read after the target's final norm.
    """

    name: str
    change: str
    files: Eagle3Files
    normed: bool = False


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Hold what a wiring accepts.

    Attributes:
        wiring: that was measured.
        lengths: of each text, the mean number of tokens committed a step.
        by_position: for each depth, the share of the drafts accepted up to there that are accepted there too.
        p: one-sided p-value of accepting more than the head's own wiring (paired t-test over the texts).
    """

    wiring: Wiring
    lengths: Sequence[float]
    by_position: Sequence[float]
    p: float = 1.0

    @property
    def length(self) -> float:
        """The mean acceptance length."""
        return math.fsum(self.lengths) / len(self.lengths)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Hold what all wirings accept.

    Attributes:
        own: of the head's own files.
        others: of each other wiring, the best first.
    """

    own: Acceptance
    others: Sequence[Acceptance]

    @property
    def better(self) -> Acceptance | None:
        """The best wiring that accepts significantly more than the head's own; None if none does.

        All wirings together raise a false alarm in one of a hundred cases (Bonferroni).
        """
        for other in self.others:
            gain = other.length - self.own.length
            if gain >= max(_LEAST_GAIN, _LEAST_SHARE * self.own.length) and other.p * len(self.others) < _FALSE_ALARMS:
                return other
        return None


@dataclass(frozen=True, slots=True)
class Text:
    """Hold a text of the target.

    Attributes:
        tokens: of prompt and continuation.
        prompt: number of the prompt's tokens.
        hidden_states: at each token, by layer.
    """

    tokens: Int[Tensor, " n"]
    prompt: int
    hidden_states: dict[int, Float[Tensor, "n hidden"]]


def examine(
    files: Eagle3Files,
    target: LM,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    tell: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> Diagnosis:
    """Measure what each wiring of a head accepts.

    Args:
        files: of the head.
        target: of the head.
        texts: prompts, and the target's greedy continuations of at least `DEPTH` + 1 tokens.
        tell: called with the number of wirings done, of all, and the name of the next.

    Raises:
        ValueError: fewer than two texts: nothing is significant.
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} text(s): a comparison takes at least two")
    total, _ = target_sizes(target)
    own, *others = wirings(files, target)
    needed = sorted({layer for wiring in (own, *others) for layer in wiring.files.layers(total)})
    read = [_read(target, *text, [layer for layer in needed if -1 <= layer < total]) for text in texts]
    measured = []
    for number, wiring in enumerate((own, *others)):
        tell(number, 1 + len(others), wiring.name or "as its files say")
        if (acceptance := _measure(wiring, target, read)) is not None:
            measured.append(acceptance)
        elif wiring is own:
            # It cannot draft at all, so that a step commits one token.
            measured.append(Acceptance(own, [1.0] * len(read), [0.0] * DEPTH))
    tell(1 + len(others), 1 + len(others), "done")
    first, *rest = measured
    compared = [replace(other, p=_p_value(other.lengths, first.lengths)) for other in rest]
    return Diagnosis(first, tuple(sorted(compared, key=lambda other: -other.length)))


def wirings(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    """Yield the wiring that a head's files say, and then those with one likely fault undone."""
    own = _without_unused(files)
    yield Wiring("", "", own)
    total, width = target_sizes(target)
    ids = [layer + 1 for layer in own.layers(total)]
    for other, what in (
        ([number - 1 for number in ids], "one lower"),
        ([number + 1 for number in ids], "one higher"),
        (sorted(ids), "sorted"),
        ([2, total // 2, total - 3], "the default ones"),
    ):
        if other != ids and len(other) == len(ids) and all(0 <= number <= total for number in other):
            yield _changed(own, f"auxiliary ids {what}", **{IDS: other})
    for flag in FLAGS:
        if (flipped := _flipped(files, flag)) is not None:
            yield flipped
    yield from _vocabularies(own)
    yield from _positions(own, target)
    if "embed_tokens.weight" in own.tensors and own.config["transformer_layer_config"].get("hidden_size") == width:
        shared = _without(own, "embed_tokens.")
        yield Wiring(
            "the target's embeddings", "remove embed_tokens.weight, which is not what it was trained on", shared
        )
    if total in ids and final_norm(target.model) is not None:
        change = (
            f"read hidden state {total} after the target's final norm, which no key of {own.folder}/config.json says"
        )
        yield Wiring(f"hidden state {total} after the final norm", change, own, normed=True)


def _changed(files: Eagle3Files, name: str, **changes: Any) -> Wiring:
    told = " and ".join(
        f"{key} to {value!r}".replace("True", "true").replace("False", "false") for key, value in changes.items()
    )
    return Wiring(name, f"set {told} in config.json", files.rewired(**changes))


def _without(files: Eagle3Files, *prefixes: str) -> Eagle3Files:
    kept = {name: tensor for name, tensor in files.tensors.items() if not name.startswith(prefixes)}
    return replace(files, tensors=kept)


def _without_unused(files: Eagle3Files) -> Eagle3Files:
    """Return the files without norms that the config does not speak of: others load them so."""
    return _without(files, *(prefix for flag, prefix in _NORMS.items() if not files.config.get(flag)))


def _flipped(files: Eagle3Files, flag: str) -> Wiring | None:
    """Return the wiring with a flag flipped; None if the weights do not allow it."""
    on = not files.config.get(flag)
    if flag in _NORMS and on and not any(name.startswith(_NORMS[flag]) for name in files.tensors):
        return None
    changes = {flag: on}
    if flag in _NORMS and on:
        changes |= {other: False for other in _NORMS if other != flag and files.config.get(other)}
    return _changed(_without_unused(files.rewired(**changes)), f"{flag} {'on' if on else 'off'}", **changes)


def _vocabularies(files: Eagle3Files) -> Iterator[Wiring]:
    """Yield other readings of the map from the head's ids to the target's."""
    if "d2t" not in files.tensors:
        return
    ids, proposed = files.tensors["d2t"], files.tensors.get("t2d")
    places = torch.arange(len(ids))
    readings = {
        "d2t as ids": (ids, "store differences in d2t: it holds the target's ids"),
        "d2t ignored": (places, "remove d2t and t2d: the head's ids are the target's"),
    }
    if proposed is not None and int(proposed.sum()) == len(ids):
        readings["d2t from t2d"] = (proposed.nonzero()[:, 0], "make d2t anew from t2d")
    for name, (tokens, change) in readings.items():
        if not torch.equal(tokens, files.tokens):
            yield Wiring(name, change, replace(files, tensors={**files.tensors, "d2t": tokens - places}))


def _positions(files: Eagle3Files, target: LM) -> Iterator[Wiring]:
    """Yield the wirings with rotary positions and the width of attention heads as the target has them."""
    own: dict[str, Any] = dict(files.config["transformer_layer_config"])
    config = target.model.config.get_text_config(decoder=True)
    rotary = own.pop("rope_parameters", None) or {"rope_type": "default", "rope_theta": own.pop("rope_theta", 10_000.0)}
    theirs = dict(getattr(config, "rope_parameters", None) or {})
    bases = {"the target's rotary positions": theirs, "rotary base 10000": {"rope_type": "default", "rope_theta": 1e4}}
    for name, other in bases.items():
        if "rope_theta" in other and {**rotary, **other} != rotary and other.get("partial_rotary_factor", 1.0) == 1.0:
            yield _changed_decoder(files, name, rope_parameters=other)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = (len(files.tensors[f"layers.0.self_attn.{part}_proj.weight"]) for part in ("q", "k"))
    current = own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
    if width != current and queries % width == 0 and keys % width == 0 and queries % keys == 0:
        counts = {"num_attention_heads": queries // width, "num_key_value_heads": keys // width}
        yield _changed_decoder(files, "the target's head_dim", head_dim=width, **counts)


def _changed_decoder(files: Eagle3Files, name: str, **changes: Any) -> Wiring:
    told = " and ".join(f"{key} to {value!r}" for key, value in changes.items())
    # Older files say their rotary positions by other keys.
    older = {"rope_theta", "rope_scaling"} if "rope_parameters" in changes else set()
    decoder = {key: x for key, x in files.config["transformer_layer_config"].items() if key not in older} | changes
    change = f"set {told} in the transformer_layer_config of config.json"
    return Wiring(name, change, files.rewired(transformer_layer_config=decoder))


@torch.inference_mode()
def _read(target: LM, prompt: Sequence[int], continuation: Sequence[int], layers: Sequence[int]) -> Text:
    tokens = torch.tensor([*prompt, *continuation])
    with recorded_hidden_states(target.model, layers) as states:
        target.model(tokens[None].to(target.device), use_cache=False)
    return Text(tokens, len(prompt), {layer: state[0] for layer, state in zip(layers, states, strict=True)})


@torch.inference_mode()
def _measure(wiring: Wiring, target: LM, texts: Sequence[Text]) -> Acceptance | None:
    """Return what a wiring accepts; None if these weights cannot be wired so."""
    try:
        head = BoundHead(make_eagle3(wiring.files, *target_sizes(target)), target)
    except (ModelFileError, UnsupportedModelError):
        return None
    norm = final_norm(target.model) if wiring.normed else None
    last = max(head.layers)
    accepted = []
    for text in texts:
        states = [text.hidden_states[layer] for layer in head.layers]
        if norm is not None:
            states = [norm(x) if layer == last else x for layer, x in zip(head.layers, states, strict=True)]
        right = _right_ahead(head, text.tokens, torch.cat(states, -1))
        # A draft begins at each token of the continuation behind which the text goes on long enough.
        drafts = [right[depth, text.prompt + depth - 1 : right.shape[1] - DEPTH + 1 + depth] for depth in range(DEPTH)]
        accepted.append(torch.stack(drafts).cumprod(0).double())
    reached = [1.0, *torch.cat(accepted, 1).mean(1).tolist()]
    by_position = [now / before if before else 0.0 for before, now in pairwise(reached)]
    return Acceptance(wiring, [1.0 + kept.sum(0).mean().item() for kept in accepted], by_position)


@torch.inference_mode()
def _right_ahead(
    head: BoundHead, tokens: Int[Tensor, " n"], hidden_states: Float[Tensor, "n F"]
) -> Bool[Tensor, "depth places"]:
    """Return whether the head's choice behind each token but the first and the last is the text's: after d of its own
    states in a row, for each d below `DEPTH`."""
    count = len(tokens) - 2
    slots, positions = head.new_slots(DEPTH * count), torch.arange(1, count + 1)
    wanted, right = tokens[2:].to(head.tokens.device), []
    state = hidden_states[:count]
    for step in range(DEPTH):
        visible = visible_ahead(count, step, positions.device)
        inputs = ForwardInput(tokens[1:-1], positions, visible, rows=count)
        state, logits = head.read(slots, inputs, state, fuse=step == 0)
        right.append((head.tokens[logits.argmax(-1)] == wanted).cpu())
        state = pad(state[:-1], (0, 0, 1, 0))
    return torch.stack(right)


def _p_value(lengths: Sequence[float], own: Sequence[float]) -> float:
    """Return the one-sided p-value of accepting more, by a paired t-test over the texts."""
    differences = [now - before for now, before in zip(lengths, own, strict=True)]
    if max(differences) == min(differences):
        return 0.0 if differences[0] > 0 else 1.0
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)
