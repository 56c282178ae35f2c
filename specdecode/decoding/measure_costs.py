"""What the parts of a step cost on this machine, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdecode.controllers.base import MAX_DRAFT_NODES, Limit
from specdecode.controllers.cost_aware import Costs, Draft
from specdecode.core.sampling import Sampling
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.cascade import Cascade
from specdecode.models.lm import LM, synchronise

# Where a target is measured: rows of a forward, and tokens in the cache.
_ROWS = (1, 2, 4, 8, 16, 32, MAX_DRAFT_NODES + 1)
_CACHED = 256
# Where a drafter is measured: depths and, if it proposes trees, nodes; and tokens that it catches up with.
_DEPTHS = (1, 2, 4, 8)
_NODES = (MAX_DRAFT_NODES, 32, 12, 4)
_SKIPPED = 32
# The text repeats itself after so many tokens, so that there is something to look up.
_PERIOD = 16
# Everything is timed so often, once it is warm, or less often where that takes longer than so many seconds.
_REPEATS, _SECONDS = 5, 1.0

_Key = TypeVar("_Key")
_targets: WeakKeyDictionary[LM, dict[int, float]] = WeakKeyDictionary()


@torch.inference_mode()
def measure_costs(target: LM, drafter: Drafter) -> Costs:
    """Time target forwards and proposals as they are in decoding: medians, in a second or two.

    A target is measured once, with the first of its drafters. The drafter remains as good as a fresh one. A cascade is
    priced as its last drafter: how often those before it will find something is not known, and `CostAware`, which
    corrects prices by a factor, corrects one that is too high, and not one of nought.
    """
    if isinstance(drafter, Cascade):
        return measure_costs(target, drafter.drafters[-1])
    if target not in _targets:
        [_targets[target]] = forward_seconds([target], _ROWS)
    reader = _Reader(target, drafter)
    sizes = _sizes(reader)
    seconds = _medians(target.device, {limit: partial(reader.propose, limit) for limit in sizes})
    reader.propose(Limit(1), _SKIPPED)
    one, many = _medians(
        target.device, {tokens: partial(reader.propose, Limit(1), tokens) for tokens in (1, _SKIPPED)}
    ).values()
    return Costs(
        verify=_targets[target],
        draft={limit: Draft(size, seconds[limit]) for limit, size in sizes.items()},
        catch_up=max(many - one, 0.0) / (_SKIPPED - 1),
    )


@torch.inference_mode()
def forward_seconds(
    targets: Sequence[LM],
    rows: Sequence[int],
    *,
    repeats: int = _REPEATS,
    seconds: float = _SECONDS,
    tell: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> list[dict[int, float]]:
    """Seconds of each target's forwards by their rows, with the acceptance of greedy decoding: medians.

    Args:
        targets: on one device. They take turns, so that they can be compared though the machine's speed drifts.
        rows: ascending. What does not fit a target's context is left out for it.
        repeats: rounds, each of all targets with all rows.
        seconds: after so many no further round begins.
        tell: called with the rounds done, their number, and what is going on.
    """
    verifiers = [_Verifier(target, rows[-1]) for target in targets]
    actions: dict[tuple[int, int], Callable[[], object]] = {}
    for count in rows:
        for place, (target, verifier) in enumerate(zip(targets, verifiers, strict=True)):
            if verifier.fits(count):
                tell(0, repeats, f"first forward of {target.backend.name}, rows {count}")
                verifier.verify(count)
                actions[place, count] = partial(verifier.verify, count)
    doing = f"forwards in turns, rows {', '.join(map(str, rows))}"
    medians = _medians(targets[0].device, actions, repeats, seconds, lambda done, total: tell(done, total, doing))
    return [
        {count: medians[place, count] for count in rows if (place, count) in medians} for place in range(len(targets))
    ]


class _Verifier:
    """A target that verifies chains, always behind the same cached tokens.

    Args:
        most: rows of its longest chain; in a short context fewer tokens are cached.
    """

    def __init__(self, target: LM, most: int) -> None:
        self._target = target
        self._cached = max(min(_CACHED, target.context_length - most), 1)
        self._tokens = _text(target, self._cached + most)
        self._slots = target.new_slots(len(self._tokens))
        target.read(self._slots, self._tokens[: self._cached])

    def fits(self, rows: int) -> bool:
        return self._cached + rows <= self._target.context_length

    def verify(self, rows: int) -> None:
        root, *drafted = self._tokens[self._cached : self._cached + rows]
        tree = DraftTree.chain(torch.tensor(drafted, dtype=torch.long))
        self._target.forward_tree(self._slots, [root], tree).argmax(-1).tolist()
        self._slots.keep([], after=self._cached)


class _Reader:
    """A drafter on a text that goes on between its proposals."""

    def __init__(self, target: LM, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self._tokens = _text(target, 2 * _PERIOD)
        self._sampling = Sampling()
        self._rng = self._sampling.rng()
        self._features = self._read(drafter.layers) if drafter.layers else None

    def _read(self, layers: tuple[int, ...]) -> Tensor:
        """What the target tells of the beginning of the text, which repeats itself; it need not read the rest."""
        tokens = self._tokens[: self._target.context_length]
        slots = self._target.new_slots(len(tokens))
        with self._target.recording_outputs(layers):
            self._target.forward(slots, torch.tensor(tokens))
        return slots.features(layers)

    def propose(self, limit: Limit, tokens: int = 1) -> DraftTree:
        """A proposal when so many tokens have been committed since the last one."""
        self._tokens = _text(self._target, len(self._tokens) + tokens)
        if self._features is not None and len(self._features) < len(self._tokens):
            self._features = self._features.repeat(2, 1)
        context = Context(self._tokens, self._target.vocab_size, self._sampling, self._rng, self._features)
        return self._drafter.propose(context, limit)


def _sizes(reader: _Reader) -> dict[Limit, int]:
    """The limits to measure, and the nodes of the proposals: several numbers of nodes where they make other trees."""
    found: dict[tuple[int, ...], dict[Limit, int]] = {}
    for nodes in _NODES:
        trees = {Limit(depth, nodes): reader.propose(Limit(depth, nodes)) for depth in _DEPTHS}
        # Nothing here does not mean nothing elsewhere: that is taken for a chain.
        sizes = {limit: len(tree) or limit.depth for limit, tree in trees.items()}
        found.setdefault(tuple(sizes.values()), sizes)
        if all(tree.depth == len(tree) for tree in trees.values()):
            break
    return {limit: size for sizes in found.values() for limit, size in sizes.items()}


def _medians(
    device: torch.device,
    actions: Mapping[_Key, Callable[[], object]],
    repeats: int = _REPEATS,
    limit: float = _SECONDS,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[_Key, float]:
    """Seconds of each action, the device synchronised; they take turns, so that a busy moment falls on all."""
    taken: dict[_Key, list[float]] = {key: [] for key in actions}
    started = time.perf_counter()
    for done in range(1, repeats + 1):
        for key, action in actions.items():
            synchronise(device)
            begun = time.perf_counter()
            action()
            synchronise(device)
            taken[key].append(time.perf_counter() - begun)
        late = time.perf_counter() - started > limit
        tell(done, done if late else repeats)
        if late:
            break
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def _text(target: LM, length: int) -> list[int]:
    period = min(_PERIOD, target.vocab_size)
    return [(7 * (i % period) + 3) % target.vocab_size for i in range(length)]
