"""Measurement of the seconds that the parts of a step need on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdecode.backends.device import synchronise
from specdecode.backends.graph import clock
from specdecode.controllers.base import MAX_DRAFT_NODES, Limit
from specdecode.controllers.cost_aware import Costs, DraftCost
from specdecode.core.sampling import Sampling
from specdecode.core.tree import DraftTree
from specdecode.decoding.values import check_parts
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.cascade import Cascade
from specdecode.models.arguments import check_lm
from specdecode.models.lm import LM
from specdecode.support.call_stack import with_stack_room

# Numbers of rows for which a target is timed, and the number of tokens in its cache at that time.
_ROWS = (1, 2, 4, 8, 16, 32, MAX_DRAFT_NODES + 1)
_CACHED_TOKENS = 256
# Depths at which a drafter is timed, and numbers of nodes, if it proposes trees.
_DEPTHS = (1, 2, 4, 8)
_NODES = (MAX_DRAFT_NODES, 32, 12, 4)
# Number of unread tokens with which a drafter is timed, to find the seconds that it needs to read one.
_SKIPPED_TOKENS = 32
# Period of the text in tokens. The text repeats, so that lookups find a match.
_PERIOD = 16
# Largest number of rounds of timing after the warm-up, and the seconds after which no further round begins.
_ROUNDS, _SECONDS = 5, 1.0

_Key = TypeVar("_Key")
_forward_seconds: WeakKeyDictionary[LM, dict[int, float]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """The seconds of a forward of one row, and of its layers alone.

    Attributes:
        forward: seconds of the forward and of the choice of its token.
        linear: seconds of its linear layers, the output head among them.
        others: seconds of its other layers without layers inside: norms, activations, embeddings, rotary positions.
    """

    forward: float
    linear: float
    others: float

    @property
    def between(self) -> float:
        """The seconds that remain: attention, residuals, cache and mask, and the code that calls all of this."""
        return max(self.forward - self.linear - self.others, 0.0)


@torch.inference_mode()
def measure_costs(target: LM, drafter: Drafter) -> Costs:
    """Time target forwards and proposals under the conditions of decoding. This needs a second or two.

    A target is timed once, with its first drafter. Afterwards the drafter still proposes as a fresh one does. If
    several processes decode together, the times of the first process count.

    A cascade gets the costs of its last drafter, because the share of proposals by the earlier drafters is unknown.
    `CostAware` corrects costs by a factor. So it can correct a cost that is too high, but not a cost of 0.

    Args:
        target: the model whose forwards are timed.
        drafter: the drafter whose proposals are timed.

    Returns:
        The median seconds of forwards, of proposals, and of reading one token that the draft has missed.

    Raises:
        ValueError: the target is no `LM`, or the drafter is none.
    """
    check_lm("target", target)
    check_parts(drafter=drafter)
    if isinstance(drafter, Cascade):
        return measure_costs(target, drafter.drafters[-1])
    if target not in _forward_seconds:
        [_forward_seconds[target]] = forward_seconds([target], _ROWS)
    proposer = _Proposer(target, drafter)
    sizes = _proposal_sizes(proposer)
    seconds = _medians(target, {limit: partial(proposer.propose, limit) for limit in sizes})
    proposer.propose(Limit(1), _SKIPPED_TOKENS)
    one, many = _medians(
        target, {tokens: partial(proposer.propose, Limit(1), tokens) for tokens in (1, _SKIPPED_TOKENS)}
    ).values()
    return Costs(
        verify=_forward_seconds[target],
        draft={limit: DraftCost(size, seconds[limit]) for limit, size in sizes.items()},
        catch_up=max(many - one, 0.0) / (_SKIPPED_TOKENS - 1),
    )


@torch.inference_mode()
def forward_seconds(
    targets: Sequence[LM],
    rows: Sequence[int],
    *,
    repeats: int = _ROUNDS,
    seconds: float = _SECONDS,
    tell: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> list[dict[int, float]]:
    """Time the verification of greedy drafts: a forward of each target, and the choice of the tokens.

    Args:
        targets: models on one device. They take turns, so that drifts of the machine's speed affect all of them.
        rows: numbers of rows of the forwards, ascending. Numbers that exceed a target's context are left out for it.
        repeats: largest number of rounds, each over all targets and numbers of rows.
        seconds: time after which no further round begins.
        tell: called with the number of finished rounds, the number of all rounds, and a description of the current
            work.

    Returns:
        For each target, the median seconds of a forward by its number of rows.
    """
    verifiers = [Verifier(target, rows[-1]) for target in targets]
    actions: dict[tuple[int, int], Callable[[], object]] = {}
    for count in rows:
        for place, (target, verifier) in enumerate(zip(targets, verifiers, strict=True)):
            if verifier.fits(count):
                tell(0, repeats, f"first forward of {target.backend.name}, rows {count}")
                verifier.verify(count)
                actions[place, count] = partial(verifier.verify, count)
    activity = f"forwards in turns, rows {', '.join(map(str, rows))}"
    medians = _medians(targets[0], actions, repeats, seconds, lambda done, total: tell(done, total, activity))
    return [
        {count: medians[place, count] for count in rows if (place, count) in medians} for place in range(len(targets))
    ]


@torch.inference_mode()
def layer_seconds(target: LM, *, repeats: int = _ROUNDS, seconds: float = _SECONDS) -> LayerSeconds:
    """Time a forward of one row, and in turns with it the same layers alone, with the same inputs.

    Args:
        target: a model whose forwards are not compiled, captured or split among processes.
        repeats: largest number of rounds.
        seconds: time after which no further round begins.

    Returns:
        Median seconds. They are measured apart from those of `forward_seconds`.
    """
    verifier = Verifier(target, 1)
    linear: list[Callable[[], object]] = []
    others: list[Callable[[], object]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # GPT-2 calls the number of inputs nx.
        kind = linear if hasattr(layer, "in_features") or hasattr(layer, "nx") else others
        kind.append(partial(layer, *inputs, **named))

    leaves = [module for module in target.model.modules() if not any(module.children())]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in leaves]
    try:
        verifier.verify(1)
    finally:
        for hook in hooks:
            hook.remove()
    actions: dict[str, Callable[[], object]] = {
        "forward": partial(verifier.verify, 1),
        "linear": lambda: [call() for call in linear],
        "others": lambda: [call() for call in others],
    }
    return LayerSeconds(**_medians(target, actions, repeats, seconds))


def cached_tokens(target: LM, most_rows: int) -> int:
    """Return the number of tokens in the cache when forwards are timed.

    Args:
        target: the model.
        most_rows: the largest number of rows. In a short context there are fewer cached tokens, so that the rows fit.
    """
    return max(min(_CACHED_TOKENS, target.context_length - most_rows), 1)


class Verifier:
    """A target that verifies chains of different lengths after the same cached tokens.

    Args:
        target: the model.
        most_rows: number of rows of the longest chain, its root included.
    """

    def __init__(self, target: LM, most_rows: int) -> None:
        self._target = target
        self._cached = cached_tokens(target, most_rows)
        self._tokens = _repeating_text(target, self._cached + most_rows)
        self._slots = target.new_slots(len(self._tokens))
        target.read(self._slots, self._tokens[: self._cached])

    def fits(self, rows: int) -> bool:
        return self._cached + rows <= self._target.context_length

    def verify(self, rows: int) -> None:
        root, *drafted = self._tokens[self._cached : self._cached + rows]
        tree = DraftTree.chain(torch.tensor(drafted, dtype=torch.long))
        # As in greedy decoding. With sampling the logits are copied, too.
        self._target.forward_tree(self._slots, [root], tree, choose=True).tolist()
        self._slots.keep([], after=self._cached)


class _Proposer:
    """A drafter that proposes for a text, which grows between the proposals."""

    def __init__(self, target: LM, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self._tokens = _repeating_text(target, 2 * _PERIOD)
        self._sampling = Sampling()
        self._rng = self._sampling.rng()
        self._hidden_states = self._read(drafter.layers) if drafter.layers else None

    def _read(self, layers: tuple[int, ...]) -> Tensor:
        """Return the target's hidden states for the beginning of the text. They are repeated for the rest, because the
        text repeats too."""
        tokens = self._tokens[: self._target.context_length]
        slots = self._target.new_slots(len(tokens))
        with self._target.recording_outputs(layers):
            self._target.forward(slots, torch.tensor(tokens))
        return slots.hidden_states(layers)

    def propose(self, limit: Limit, tokens: int = 1) -> DraftTree:
        """Extend the text and return the drafter's proposal after it.

        Args:
            limit: limit of the proposal.
            tokens: number of tokens by which the text grows first.
        """
        self._tokens = _repeating_text(self._target, len(self._tokens) + tokens)
        if self._hidden_states is not None and len(self._hidden_states) < len(self._tokens):
            self._hidden_states = self._hidden_states.repeat(2, 1)
        context = Context(self._tokens, self._target.vocab_size, self._sampling, self._rng, self._hidden_states)
        return self._drafter.propose(context, limit)


def _proposal_sizes(proposer: _Proposer) -> dict[Limit, int]:
    """Return the limits to time, each with its number of proposed nodes. Of several node limits that give trees of the
    same sizes, only one is timed."""
    distinct: dict[tuple[int, ...], dict[Limit, int]] = {}
    for nodes in _NODES:
        trees = {Limit(depth, nodes): proposer.propose(Limit(depth, nodes)) for depth in _DEPTHS}
        # A drafter that proposes nothing for this text may propose for other texts: assume a chain.
        sizes = {limit: len(tree) or limit.depth for limit, tree in trees.items()}
        distinct.setdefault(tuple(sizes.values()), sizes)
        if all(tree.depth == len(tree) for tree in trees.values()):
            break
    return {limit: size for sizes in distinct.values() for limit, size in sizes.items()}


@with_stack_room
def _medians(
    target: LM,
    actions: Mapping[_Key, Callable[[], object]],
    repeats: int = _ROUNDS,
    limit: float = _SECONDS,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[_Key, float]:
    """Return the median seconds of each action, with the target's device synchronised.

    The actions take turns, so that other work on the machine slows all of them.

    Args:
        target: the model whose device is synchronised.
        actions: calls to time.
        repeats: largest number of rounds, each with one call of every action.
        limit: seconds after which no further round begins.
        tell: called with the number of finished rounds and the number of all rounds.
    """
    taken: dict[_Key, list[float]] = {key: [] for key in actions}
    started = time.perf_counter()
    for done in range(1, repeats + 1):
        for key, action in actions.items():
            synchronise(target.device)
            begun = clock()
            action()
            synchronise(target.device)
            taken[key].append(clock() - begun)
        late = target.ranks.agreed(time.perf_counter() - started > limit)
        tell(done, done if late else repeats)
        if late:
            break
    return target.ranks.agreed({key: statistics.median(seconds) for key, seconds in taken.items()})


def _repeating_text(target: LM, length: int) -> list[int]:
    period = min(_PERIOD, target.vocab_size)
    return [(7 * (i % period) + 3) % target.vocab_size for i in range(length)]
