"""Measure perplexity and divergence through the decode path: the steps, slots and evictions that decoding uses.

A prefill reads a text in one forward, and would not show the effects of a cache policy or of a wrong slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK, Limit
from specdecode.core.tree import DraftTree
from specdecode.decoding.teacher_forced import ForcedStep, teacher_forced
from specdecode.drafters.base import Context, Drafter
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


class OracleDrafter:
    """A drafter that knows the text, so its proposals are always right.

    Args:
        text: token ids.
        branches: number of siblings at each depth, of which the last is right; 1 gives a chain.
    """

    forwards = 0
    layers = ()

    def __init__(self, text: Sequence[int], branches: int = 1) -> None:
        self.text = list(text)
        self.branches = branches

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        """Return the next tokens of the text, each behind its wrong siblings, which verification rejects."""
        place = len(context.tokens)
        continuation = self.text[place : place + min(limit.depth, limit.nodes // self.branches)]
        wrong = range(1 - self.branches, 0)
        tokens = [(token + offset) % context.vocab_size for token in continuation for offset in (*wrong, 0)]
        # The right token is the last at its depth, and the parent of all tokens of the next depth.
        parents = [i // self.branches * self.branches for i in range(len(tokens))]
        return DraftTree(torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long))


@dataclass(frozen=True, slots=True)
class DecodePath:
    """The settings of decoding: a target with its cache policy, drafter and controller.

    Attributes:
        lm: the target.
        policy: chooses the tokens that stay in the target's cache.
        drafter: creates the drafter of a text from that text; by default a drafter that proposes the text itself.
        controller: creates the controller of a text; K + 1 is the width of a step.
    """

    lm: LM
    policy: CachePolicy = field(default_factory=KeepAll)
    drafter: Callable[[Sequence[int]], Drafter] = OracleDrafter
    controller: Callable[[], Controller] = lambda: FixedK(5)

    def forced_steps(self, text: Sequence[int], start: int = 1) -> Iterator[ForcedStep]:
        """Decode a text with teacher forcing, from an empty cache; arguments as for `teacher_forced`."""
        return teacher_forced(
            self.lm, text, start, drafter=self.drafter(text), controller=self.controller(), policy=self.policy
        )


def windows(length: int, size: int | None = None, stride: int | None = None) -> list[tuple[int, int, int]]:
    """Return the windows in which a document is read, each with its own cache.

    The first window begins with the document, and each later window `stride` tokens after the previous one. A window
    scores the tokens that no earlier window scored. So every token but the document's first is scored once. Behind the
    first window, each scored token has at least `size - stride` tokens before it in its window.

    Args:
        length: tokens of the document.
        size: tokens of a window; by default the whole document.
        stride: tokens from the beginning of a window to the beginning of the next; by default half a window.

    Returns:
        For each window: its beginning, the first token that it scores, and its end.

    Raises:
        ValueError: fewer than 2 tokens, or a stride that leaves a token without a token before it.
    """
    size = length if size is None else size
    stride = max(size // 2, 1) if stride is None else stride
    if length < 2 or size < 2:
        raise ValueError(f"{length} tokens cannot be read in windows of {size}: both numbers are at least 2")
    if not 1 <= stride < size:
        raise ValueError(f"stride is {stride}: it is from 1 to {size - 1} in windows of {size} tokens")
    spans, scored = [], 1
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        spans.append((begin, scored, end))
        scored = end
        if end == length:
            break
    return spans


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The predictions of one decode path for all tokens of a document but the first.

    Attributes:
        nll: [n] -log p of each token, in nats.
        kl: [n] KL(reference || this) of the distribution that predicted the token, in nats.
        agrees: [n] whether both distributions have the same most probable token.
        since: [n] number of tokens read between the last eviction and this token; 0 before the first eviction.
    """

    nll: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    agrees: Bool[Tensor, " n"]
    since: Int[Tensor, " n"]


def negative_log_likelihoods(
    path: DecodePath, tokens: Sequence[int], size: int | None = None, stride: int | None = None
) -> Float[Tensor, " n"]:
    """Compute -log p of each token of a document after the first, in nats, with teacher forcing.

    Args:
        path: the decode path.
        tokens: token ids of the document.
        size: tokens of a window, see `windows`.
        stride: tokens from one window to the next, see `windows`.

    Raises:
        ValueError: impossible windows, or windows longer than the model's context.
    """
    losses = []
    for begin, first, end in windows(len(tokens), size, stride):
        for step in path.forced_steps(tokens[begin:end], first - begin):
            place = begin + step.place
            losses.append(_nll(_log_probs(step.logits), tokens[place : place + len(step.logits)]))
    return torch.cat(losses)


@torch.inference_mode()
def compare(
    reference: DecodePath,
    paths: Mapping[str, DecodePath],
    tokens: Sequence[int],
    size: int | None = None,
    stride: int | None = None,
    tell: Callable[[int], None] = lambda scored: None,
) -> tuple[Float[Tensor, " n"], dict[str, TokenScores]]:
    """Read a document with several decode paths, and compare their distributions with a reference's, token by token.

    All paths read the document side by side, and the path that is furthest behind takes the next step. So memory holds
    the distributions of only a step or two of the reference, and of one step of each other path.

    Args:
        reference: decode path to compare with, usually with the full cache.
        paths: decode paths by name; at least one.
        tokens: token ids of the document.
        size: tokens of a window, see `windows`.
        stride: tokens from one window to the next, see `windows`.
        tell: called after each step with the number of tokens that all paths have scored in sum.

    Returns:
        -log p of each token by the reference, in nats, and the scores of each path, by name.

    Raises:
        ValueError: impossible windows, windows longer than a model's context, or different vocabularies.
    """
    vocab_size = reference.lm.vocab_size
    if other := next((name for name, path in paths.items() if path.lm.vocab_size != vocab_size), None):
        raise ValueError(
            f"{other} cannot be compared: its vocabulary has {paths[other].lm.vocab_size} tokens, and the reference's"
            f" {vocab_size}"
        )
    losses: list[Tensor] = []
    parts: dict[str, list[TokenScores]] = {name: [] for name in paths}
    scored = 0
    for begin, first, end in windows(len(tokens), size, stride):
        text, start = tokens[begin:end], first - begin
        known = _ReferenceScores(reference.forced_steps(text, start), start, text)
        running = {name: path.forced_steps(text, start) for name, path in paths.items()}
        places = dict.fromkeys(running, start)
        while running:
            name = min(running, key=places.__getitem__)
            step = next(running[name], None)
            if step is None:
                del running[name]
                continue
            parts[name].append(_compared(step, known.log_probs(step.place, len(step.logits)), text))
            places[name] += len(step.logits)
            known.forget(min(places.values()))
            scored += len(step.logits)
            tell(scored)
        losses += known.losses
    columns = [column.name for column in fields(TokenScores)]
    scores = {
        name: TokenScores(*(torch.cat([getattr(part, column) for part in steps]).cpu() for column in columns))
        for name, steps in parts.items()
    }
    return torch.cat(losses).cpu(), scores


def perplexity(losses: Sequence[Float[Tensor, " _"]]) -> float:
    """Compute exp(sum of NLL / number of tokens) over a corpus, from the losses of its documents."""
    return math.exp(torch.cat(list(losses)).mean().item())


class _ReferenceScores:
    """The reference's distributions, computed on request, and held until all paths have used them.

    Attributes:
        losses: -log p of the tokens scored so far, a tensor for each step.
    """

    def __init__(self, steps: Iterator[ForcedStep], start: int, text: Sequence[int]) -> None:
        self._steps = steps
        self._text = text
        self._first = start
        self._rows: list[Tensor] = []  # a row for each token, from `_first` on
        self.losses: list[Tensor] = []

    def log_probs(self, place: int, count: int) -> Float[Tensor, "count V"]:
        """Return log p of every token of the vocabulary, at `count` places of the text from `place` on."""
        while self._first + len(self._rows) < place + count:
            step = next(self._steps)
            rows = _log_probs(step.logits)
            self.losses.append(_nll(rows, self._text[step.place : step.place + len(rows)]))
            self._rows += rows
        return torch.stack(self._rows[place - self._first : place - self._first + count])

    def forget(self, place: int) -> None:
        """Drop the distributions before this place."""
        del self._rows[: place - self._first]
        self._first = place


def _compared(step: ForcedStep, reference: Float[Tensor, "n V"], text: Sequence[int]) -> TokenScores:
    """Score the tokens of one step."""
    log_probs = _log_probs(step.logits)
    places = torch.arange(step.place, step.place + len(log_probs), device=log_probs.device)
    return TokenScores(
        nll=_nll(log_probs, text[step.place : step.place + len(log_probs)]),
        kl=torch.nn.functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1),
        agrees=log_probs.argmax(-1) == reference.argmax(-1),
        since=torch.zeros_like(places) if step.evicted_at is None else places - step.evicted_at,
    )


def _log_probs(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """Return log p in double precision, whatever the model's type: the compared values differ very little."""
    return logits.double().log_softmax(-1)


def _nll(log_probs: Float[Tensor, "n V"], tokens: Sequence[int]) -> Float[Tensor, " n"]:
    """Return -log p of the tokens."""
    return -log_probs.gather(1, torch.tensor(tokens, device=log_probs.device)[:, None])[:, 0]
