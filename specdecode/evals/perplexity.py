"""Perplexity and divergence through the decode path: the steps, slots and evictions that decoding uses.

A prefill, which reads a text without its cache, would show nothing of what a cache policy or a wrong slot does.
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
from specdecode.decoding.teacher_forced import Followed, follow
from specdecode.drafters.base import Context, Drafter
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


class Foretold:
    """Proposes how a known text goes on, as a drafter would that is always right.

    Args:
        text: token ids.
        branches: 2 puts a wrong sibling in front of each right proposal, which is then rejected; 1 is a chain.
    """

    forwards = 0
    layers = ()

    def __init__(self, text: Sequence[int], branches: int = 1) -> None:
        self.text = list(text)
        self.branches = branches

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        place = len(context.tokens)
        known = self.text[place : place + min(limit.depth, limit.nodes // self.branches)]
        wrong = range(1 - self.branches, 0)
        tokens = [(token + off) % context.vocab_size for token in known for off in (*wrong, 0)]
        # The right one is the last of its depth, and the siblings of the next depth follow it.
        parents = [i // self.branches * self.branches for i in range(len(tokens))]
        return DraftTree(torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long))


@dataclass(frozen=True, slots=True)
class DecodePath:
    """A way to decode, to be judged.

    Attributes:
        lm: reads.
        policy: what stays in its cache.
        drafter: makes the drafter for one text, from that text; by default one that proposes it.
        controller: makes the controller for one text; K + 1 is the width of a step.
    """

    lm: LM
    policy: CachePolicy = field(default_factory=KeepAll)
    drafter: Callable[[Sequence[int]], Drafter] = Foretold
    controller: Callable[[], Controller] = lambda: FixedK(5)

    def follow(self, text: Sequence[int], start: int = 1) -> Iterator[Followed]:
        """`decode.follow` this way, with a cache that is empty at first."""
        return follow(
            self.lm, text, start, drafter=self.drafter(text), controller=self.controller(), policy=self.policy
        )


def windows(length: int, size: int | None = None, stride: int | None = None) -> list[tuple[int, int, int]]:
    """The windows through which a document is read, each with a cache of its own.

    The first begins with the document, each other one `stride` tokens after the one before it. In each the tokens are
    judged that none before it has judged, so that all but the document's first are judged once, and all but those of
    the first window with `size - stride` tokens before them at least.

    Args:
        length: tokens of the document.
        size: tokens of a window; by default all of them.
        stride: from one window to the next; by default half a window.

    Returns:
        For each window where it begins, the first token that is judged, and where it ends.

    Raises:
        ValueError: fewer than 2 tokens, or a stride that leaves a token without one before it.
    """
    size = length if size is None else size
    stride = max(size // 2, 1) if stride is None else stride
    if length < 2 or size < 2:
        raise ValueError(f"{length} tokens are read in windows of {size}: a token is judged by those before it")
    if not 1 <= stride < size:
        raise ValueError(f"stride is {stride}: it is from 1 to {size - 1} in windows of {size} tokens")
    found, judged = [], 1
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        found.append((begin, judged, end))
        judged = end
        if end == length:
            break
    return found


@dataclass(frozen=True, slots=True)
class Judged:
    """What one way to decode made of the tokens of a document, all but the first.

    Attributes:
        nll: [n] -log p of each token, in nats.
        kl: [n] KL(reference || this) of the law that the token was chosen from, in nats.
        agrees: [n] whether both laws have the same most probable token.
        since: [n] tokens that were read since the last eviction, the one before this included; 0 before the first.
    """

    nll: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    agrees: Bool[Tensor, " n"]
    since: Int[Tensor, " n"]


def negative_log_likelihoods(
    path: DecodePath, tokens: Sequence[int], size: int | None = None, stride: int | None = None
) -> Float[Tensor, " n"]:
    """-log p of each token of a document after the first, in nats, teacher-forced.

    Args:
        path: the way to decode.
        tokens: the document.
        size: of `windows`.
        stride: likewise.

    Raises:
        ValueError: windows that cannot be, or that the model's context does not hold.
    """
    losses = []
    for begin, first, end in windows(len(tokens), size, stride):
        for step in path.follow(tokens[begin:end], first - begin):
            place = begin + step.place
            losses.append(_nll(_laws(step.logits), tokens[place : place + len(step.logits)]))
    return torch.cat(losses)


@torch.inference_mode()
def judge(
    reference: DecodePath,
    paths: Mapping[str, DecodePath],
    tokens: Sequence[int],
    size: int | None = None,
    stride: int | None = None,
    tell: Callable[[int], None] = lambda judged: None,
) -> tuple[Float[Tensor, " n"], dict[str, Judged]]:
    """Read a document in several ways, and compare what each says of every token with what a reference says.

    All go through the document side by side, whichever is furthest behind next: of the reference's laws those of a step
    or two are held at any time, and of each other way those of one step.

    Args:
        reference: what the others are compared with: usually the full cache.
        paths: ways to decode, by name; at least one.
        tokens: the document.
        size: of `windows`.
        stride: likewise.
        tell: called after each step with how many tokens all ways have judged together.

    Returns:
        -log p of each token by the reference, in nats, and what each way made of them, by name.

    Raises:
        ValueError: windows that cannot be, or that a model's context does not hold; or vocabularies that differ.
    """
    size_here = reference.lm.vocab_size
    if other := next((name for name, path in paths.items() if path.lm.vocab_size != size_here), None):
        raise ValueError(
            f"{other} cannot be compared: its vocabulary has {paths[other].lm.vocab_size} tokens, and the reference's"
            f" {size_here}"
        )
    losses: list[Tensor] = []
    found: dict[str, list[Judged]] = {name: [] for name in paths}
    judged = 0
    for begin, first, end in windows(len(tokens), size, stride):
        text, start = tokens[begin:end], first - begin
        known = _Known(reference.follow(text, start), start, text)
        going = {name: path.follow(text, start) for name, path in paths.items()}
        places = dict.fromkeys(going, start)
        while going:
            name = min(going, key=places.__getitem__)
            step = next(going[name], None)
            if step is None:
                del going[name]
                continue
            found[name].append(_compare(step, known.laws(step.place, len(step.logits)), text))
            places[name] += len(step.logits)
            known.forget(min(places.values()))
            judged += len(step.logits)
            tell(judged)
        losses += known.losses
    names = [each.name for each in fields(Judged)]
    whole = {
        name: Judged(*(torch.cat([getattr(part, of) for part in parts]).cpu() for of in names))
        for name, parts in found.items()
    }
    return torch.cat(losses).cpu(), whole


def perplexity(losses: Sequence[Float[Tensor, " _"]]) -> float:
    """exp(sum of NLL / number of tokens) over a corpus, from the losses of its documents."""
    return math.exp(torch.cat(list(losses)).mean().item())


class _Known:
    """The reference's laws, read when they are asked for, and held until all have used them.

    Attributes:
        losses: -log p of the tokens that it has judged so far.
    """

    def __init__(self, steps: Iterator[Followed], start: int, text: Sequence[int]) -> None:
        self._steps = steps
        self._text = text
        self._first = start
        self._rows: list[Tensor] = []  # one a token, from the first on
        self.losses: list[Tensor] = []

    def laws(self, place: int, count: int) -> Float[Tensor, "count V"]:
        """log p of every token at so many places of the text."""
        while self._first + len(self._rows) < place + count:
            step = next(self._steps)
            laws = _laws(step.logits)
            self.losses.append(_nll(laws, self._text[step.place : step.place + len(laws)]))
            self._rows += laws
        return torch.stack(self._rows[place - self._first : place - self._first + count])

    def forget(self, place: int) -> None:
        """What lies before this place is not asked for again."""
        del self._rows[: place - self._first]
        self._first = place


def _compare(step: Followed, reference: Float[Tensor, "n V"], text: Sequence[int]) -> Judged:
    laws = _laws(step.logits)
    read = torch.arange(step.place, step.place + len(laws), device=laws.device)
    return Judged(
        nll=_nll(laws, text[step.place : step.place + len(laws)]),
        kl=torch.nn.functional.kl_div(laws, reference, reduction="none", log_target=True).sum(-1),
        agrees=laws.argmax(-1) == reference.argmax(-1),
        since=torch.zeros_like(read) if step.evicted is None else read - step.evicted,
    )


def _laws(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """log p, in double precision whatever the model's type: what is compared lies close together."""
    return logits.double().log_softmax(-1)


def _nll(laws: Float[Tensor, "n V"], tokens: Sequence[int]) -> Float[Tensor, " n"]:
    return -laws.gather(1, torch.tensor(tokens, device=laws.device)[:, None])[:, 0]
