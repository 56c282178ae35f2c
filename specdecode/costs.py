"""What the parts of a step cost on this machine, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from specdecode.controller import MAX_DRAFT_NODES, Costs, Draft, Limit
from specdecode.drafters.base import Context, Drafter
from specdecode.lm import LM, synchronise
from specdecode.sampling import Sampling
from specdecode.tree import DraftTree

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

    A target is measured once, with the first of its drafters. The drafter remains as good as a fresh one.
    """
    if target not in _targets:
        _targets[target] = _time_target(target)
    reader = _Reader(target, drafter)
    sizes = _sizes(reader)
    seconds = _medians(target, {limit: partial(reader.propose, limit) for limit in sizes})
    reader.propose(Limit(1), _SKIPPED)
    one, many = _medians(
        target, {tokens: partial(reader.propose, Limit(1), tokens) for tokens in (1, _SKIPPED)}
    ).values()
    return Costs(
        verify=_targets[target],
        draft={limit: Draft(size, seconds[limit]) for limit, size in sizes.items()},
        catch_up=max(many - one, 0.0) / (_SKIPPED - 1),
    )


def _time_target(target: LM) -> dict[int, float]:
    """Seconds of a forward by its rows, with the acceptance of greedy decoding."""
    cached = max(min(_CACHED, target.context_length - _ROWS[-1]), 1)
    tokens = _text(target, cached + _ROWS[-1])
    slots = target.new_slots(len(tokens))
    target.read(slots, tokens[:cached])

    def verify(rows: int) -> None:
        tree = DraftTree.chain(torch.tensor(tokens[cached + 1 : cached + rows], dtype=torch.long))
        target.forward_tree(slots, tokens[cached : cached + 1], tree).argmax(-1).tolist()
        slots.keep([], after=cached)

    fitting = [rows for rows in _ROWS if cached + rows <= target.context_length]
    for rows in fitting:
        verify(rows)
    return _medians(target, {rows: partial(verify, rows) for rows in fitting})


class _Reader:
    """A drafter on a text that goes on between its proposals."""

    def __init__(self, target: LM, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self._tokens = _text(target, 2 * _PERIOD)
        self._sampling = Sampling()
        self._rng = self._sampling.rng()

    def propose(self, limit: Limit, tokens: int = 1) -> DraftTree:
        """A proposal when so many tokens have been committed since the last one."""
        self._tokens = _text(self._target, len(self._tokens) + tokens)
        context = Context(self._tokens, self._target.vocab_size, self._sampling, self._rng)
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


def _medians(target: LM, actions: Mapping[_Key, Callable[[], object]]) -> dict[_Key, float]:
    """Seconds of each action, the device synchronised; they take turns, so that a busy moment falls on all."""
    taken: dict[_Key, list[float]] = {key: [] for key in actions}
    started = time.perf_counter()
    for _ in range(_REPEATS):
        for key, action in actions.items():
            synchronise(target.device)
            begun = time.perf_counter()
            action()
            synchronise(target.device)
            taken[key].append(time.perf_counter() - begun)
        if time.perf_counter() - started > _SECONDS:
            break
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def _text(target: LM, length: int) -> list[int]:
    period = min(_PERIOD, target.vocab_size)
    return [(7 * (i % period) + 3) % target.vocab_size for i in range(length)]
