"""Detection of miswired heads. The config of a miswired head gives another wiring than the weights were trained with.

Such a head drafts without an error, but its proposals are accepted less often. The doctor measures the acceptance with
each likely wiring of the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdecode.core.errors import ModelFileError, SpecDecodeError, UnsupportedModelError
from specdecode.core.transfer import moved
from specdecode.heads.bound import check_fit, output_rows, target_sizes
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import Eagle3Files, check_tokens, describe, make_eagle3
from specdecode.heads.fingerprint import check_fingerprint
from specdecode.heads.unrolled import unrolled
from specdecode.heads.wirings import Wiring, likely_wirings
from specdecode.models.lm import LM
from specdecode.models.recording import recorded_hidden_states

AHEAD = 4
"""Length of the chains whose acceptance is measured, in tokens."""

LEAST_TEXTS, LEAST_TOKENS = 4, 16
"""Least number of texts, and least number of tokens of a text, for a judgement."""

Tell = Callable[[int, int, str], None]
"""A function that reports progress. Its arguments are the finished part, the whole, and a description of the current
work."""

# Probability that all intervals together contain the true values.
_COVERAGE = 0.95
# Least gains that count: in tokens per step, and as a share of the mean acceptance length.
_LEAST_GAIN, _LEAST_SHARE = 0.02, 0.02
# Least tokens per step with the best wiring. With fewer, the head was not trained for this target, or not at all.
_LEAST_ACCEPTED = 1.1


@dataclass(frozen=True, slots=True)
class GreedyText:
    """A text that a target has written greedily.

    Attributes:
        tokens: tokens of the prompt and its continuation.
        given: number of tokens of the prompt.
    """

    tokens: Int[Tensor, " n"]
    given: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The measured acceptance with a wiring.

    Attributes:
        wiring: the wiring of the head.
        by_position: acceptance at each position of a chain: the share of accepted proposals among those with accepted
            predecessors.
        lengths: mean acceptance length of each text.
        gain: difference between the mean acceptance length and that of the config's wiring, averaged over texts.
        low: lower end of the gain's interval.
        high: upper end of the gain's interval.
        unusable: the reason why the weights cannot be wired in this way; "" otherwise. An unusable wiring has no
            accepted proposals.
    """

    wiring: Wiring
    by_position: tuple[float, ...]
    lengths: tuple[float, ...]
    gain: float
    low: float
    high: float
    unusable: str = ""

    @property
    def mean_acceptance_length(self) -> float:
        return fmean(self.lengths)


@dataclass(frozen=True, slots=True)
class Examination:
    """The result of an examination.

    Attributes:
        measured: the acceptance with each wiring, the config's wiring first.
        better: the wiring with the highest acceptance of those significantly better than the config's; None if there is
            none.
        refusal: the reason why `load_head` refuses the folder; "" if it does not.
    """

    measured: tuple[Measured, ...]
    better: Measured | None
    refusal: str

    @property
    def drafts(self) -> bool:
        """Whether the acceptance with any wiring is as high as for a trained head."""
        return max(each.mean_acceptance_length for each in self.measured) >= _LEAST_ACCEPTED


def examine(
    files: Eagle3Files,
    target: LM,
    texts: Sequence[GreedyText],
    tell: Tell = lambda done, total, doing: None,
) -> Examination:
    """Measure the acceptance of a head with each likely wiring, and judge.

    The head drafts a chain from each place of the texts. Another wiring is better if its acceptance is significantly
    higher: the interval of its mean gain over the texts lies above zero. The intervals are by Student's t, with the
    Bonferroni correction for the number of wirings. The unit is a text, since places within a text depend on each
    other.

    Args:
        files: files of the head.
        target: the target, loaded with backend="eager".
        texts: texts that the target has written, at least `LEAST_TEXTS`.
        tell: called with the number of measured wirings, the number of all wirings, and a description of the current
            work.

    Returns:
        The acceptance with each wiring, and the judgement.

    Raises:
        ModelFileError: no likely wiring fits the head's weights.
        UnsupportedModelError: the head is for another target, or its architecture cannot be read.
    """
    if files.fingerprint is not None:
        check_fingerprint(files.folder, files.fingerprint, target)
    total, width = target_sizes(target)
    wirings = list(likely_wirings(files, target))
    layers = {layer for wiring in wirings for layer in wiring.layers(total) if -1 <= layer < total}
    hidden_states = _hidden_states(target, texts, sorted(layers))
    if hidden_states[total].shape[-1] != width:
        # OPT projects the states after its final norm to the width of its embeddings, which a head cannot read.
        wirings = [wiring for wiring in wirings if not wiring.final_norm]
    accepted: dict[Wiring, list[Tensor]] = {}
    reasons: dict[Wiring, SpecDecodeError] = {}
    stated, *_ = wirings
    for wiring, head in _built(wirings, target, reasons):
        tell(wirings.index(wiring), len(wirings), f"{files.folder.name}: {wiring.name}")
        read = torch.cat([hidden_states[layer] for layer in wiring.layers(total)], -1)
        accepted[wiring] = _accepted_lengths(head, target, texts, read)
    if not accepted:
        raise reasons[stated]
    if stated not in accepted:
        nothing = [torch.zeros_like(lengths) for lengths in next(iter(accepted.values()))]
        accepted = {stated: nothing, **accepted}
    measured = _compare(accepted, str(reasons.get(stated, "")))
    return Examination(measured, _better(measured), _refusal(files, target))


def _built(
    wirings: Sequence[Wiring], target: LM, reasons: dict[Wiring, SpecDecodeError]
) -> Iterator[tuple[Wiring, Eagle3Head]]:
    """Yield the wirings that fit the weights, each with its head on the target's device.

    A wiring that equals an earlier one is left out. Only one head is in memory at a time.

    Args:
        wirings: wirings to build.
        target: the target.
        reasons: receives the error of each wiring that does not fit.
    """
    total, width = target_sizes(target)
    seen: list[tuple[object, ...]] = []
    for wiring in wirings:
        try:
            head = make_eagle3(wiring.files, total, width)
            check_fit(head, target)
        except SpecDecodeError as error:
            reasons[wiring] = error
            continue
        same = (describe(head.shape), head.shape.own_embeddings, wiring.layers(total), head.tokens.tolist())
        if same not in seen:
            seen.append(same)
            yield wiring, head.to(target.device, target.dtype).train(False).requires_grad_(False)


@torch.inference_mode()
def _hidden_states(
    target: LM, texts: Sequence[GreedyText], layers: Sequence[int]
) -> dict[int, Float[Tensor, "texts n _"]]:
    """Return a target's hidden states for texts, by layer. The key of the states after the final norm is the number of
    all layers.

    Each text is read in one forward without a cache. Shorter texts are padded at the end.
    """
    total, _ = target_sizes(target)
    of_texts = []
    for text in texts:
        with recorded_hidden_states(target.model, layers) as states:
            final = target.model.base_model(text.tokens[None].to(target.device), use_cache=False).last_hidden_state
        of_texts.append([state[0] for state in (*states, moved(final, target.device))])
    by_layer = zip([*layers, total], zip(*of_texts, strict=True), strict=True)
    return {layer: pad_sequence(list(states), batch_first=True) for layer, states in by_layer}


@torch.inference_mode()
def _accepted_lengths(
    head: Eagle3Head, target: LM, texts: Sequence[GreedyText], hidden_states: Float[Tensor, "texts n F"]
) -> list[Int[Tensor, " places"]]:
    """Return the number of accepted tokens of a head's chain at each place of each text, from the prompt's last token
    on.

    The target has written the texts. So it accepts the proposals that agree with the text, up to the first wrong one.
    """
    embedding = head.embed_tokens if head.embed_tokens is not None else target.model.get_input_embeddings()
    table: Any = embedding.weight
    rows = head.lm_head.weight if head.lm_head is not None else output_rows(target, head.tokens)
    tokens = pad_sequence([text.tokens for text in texts], batch_first=True).to(target.device)
    # A head with fewer embeddings than the target drafts nothing after a token that it lacks.
    drafts = (tokens[:, 1:-1] < len(table)).cumprod(1).bool()
    embedded = embedding(tokens[:, 1:-1].clamp_max(len(table) - 1))
    agrees = []
    for ahead, states in enumerate(unrolled(head, embedded, hidden_states[:, :-2], AHEAD)):
        # Pair i belongs to token i + 1, and predicts token i + 2. The first pair that counts is that of the prompt's
        # last token.
        counted = [(max(text.given - 2, 0) + ahead, len(text.tokens) - 2) for text in texts]
        read = torch.cat([states[text, first:end] for text, (first, end) in enumerate(counted)])
        wanted = torch.cat([tokens[text, first + 2 : end + 2] for text, (first, end) in enumerate(counted)])
        agreed = head.tokens[head.logits(read, rows).argmax(-1)] == wanted
        agreed &= torch.cat([drafts[text, first:end] for text, (first, end) in enumerate(counted)])
        agrees.append(agreed.cpu().split([end - first for first, end in counted]))
    # Chains from the last places of a text would pass its end, so these places are left out.
    by_text = zip(*agrees, strict=True)
    return [torch.stack([agreed[: len(chain[-1])] for agreed in chain]).cumprod(0).sum(0) for chain in by_text]


def _compare(accepted: Mapping[Wiring, Sequence[Tensor]], unusable: str) -> tuple[Measured, ...]:
    """Compare the accepted lengths of each wiring with those of the first wiring.

    Args:
        accepted: for each wiring, the number of accepted tokens at each place of each text.
        unusable: the reason why the first wiring is unusable, or "".
    """
    lengths = {wiring: [1.0 + float(text.double().mean()) for text in texts] for wiring, texts in accepted.items()}
    stated, *_ = lengths
    measured = []
    for wiring, texts in accepted.items():
        everywhere = torch.cat(list(texts))
        reached = [int((everywhere >= depth).sum()) for depth in range(AHEAD + 1)]
        by_position = tuple(now / max(before, 1) for before, now in pairwise(reached))
        gains = [new - old for new, old in zip(lengths[wiring], lengths[stated], strict=True)]
        half = _student_half(gains, comparisons=max(len(accepted) - 1, 1))
        gain = fmean(gains)
        reason = unusable if wiring is stated else ""
        measured.append(Measured(wiring, by_position, tuple(lengths[wiring]), gain, gain - half, gain + half, reason))
    return tuple(measured)


def _student_half(values: Sequence[float], comparisons: int) -> float:
    """Return half the width of a mean's confidence interval, by Student's t.

    Args:
        values: values whose mean is estimated.
        comparisons: number of intervals that hold together (Bonferroni correction).
    """
    # Imported here, because the import needs a second.
    from scipy.stats import t

    tail = (1 - _COVERAGE) / 2 / comparisons
    return float(t.ppf(1 - tail, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _better(measured: Sequence[Measured]) -> Measured | None:
    """Return the wiring with the largest gain over the first wiring, if the gain is significant and large enough."""
    stated, *others = measured
    least = max(_LEAST_GAIN, _LEAST_SHARE * stated.mean_acceptance_length)
    better = [other for other in others if other.low > 0 and other.gain >= least]
    return max(better, key=lambda other: other.gain, default=None)


def _refusal(files: Eagle3Files, target: LM) -> str:
    """Return the reason why `load_head` refuses a head; "" if it does not."""
    try:
        check_tokens(files)
        check_fit(make_eagle3(files, *target_sizes(target)), target)
    except (ModelFileError, UnsupportedModelError) as error:
        return str(error)
    return ""
