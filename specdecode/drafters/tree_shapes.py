"""Shapes of draft trees: the rules that choose the continuations of each node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng
from specdecode.core.transfer import moved, picked
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The proposals of one depth.

    Attributes:
        tokens: [c] token ids.
        rows: for each token, its parent's row in the level above; the root is the only row above the first level.
        probs: [c, V] the distribution that each token was drawn from, given its earlier siblings; None if
            deterministic.
        scores: natural logarithm of the probability of each token's path under the draft; None if the shape does not
            use it.
        host_tokens: the token ids on the host, if they were copied there; else empty.
    """

    tokens: Int[Tensor, " c"]
    rows: Sequence[int]
    probs: Float[Tensor, "c V"] | None = None
    scores: Sequence[float] | None = None
    host_tokens: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)


class TreeShape(Protocol):
    """A rule that grows a tree level by level. Every level except the last costs one draft forward over its nodes."""

    def grow(
        self, distributions: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None
    ) -> Level:
        """Return the next level. An empty level ends the tree.

        Args:
            distributions: the draft's distribution at each node of the last level, or at the root.
            above: the levels so far.
            limit: largest depth and number of nodes of the tree.
            rng: the randomness of this generation; None under greedy decoding.
        """
        ...

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        """Return whether another level may follow. It is called before the forward over the last level so far."""
        ...

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        """Return the nodes to propose, ascending, with their ancestors. Nodes are numbered from 0 through all
        levels."""
        ...


Read = Callable[[Level, Bool[Tensor, "rows read"], int], Float[Tensor, "rows V"]]
"""A function that runs a forward of the draft over a level, and returns the draft's distributions at its nodes. Its
arguments are the level, a mask and the level's depth. Row i of the mask marks the nodes that node i of the level sees:
first the nodes of the levels above, then the nodes of this level."""


def grow_tree(
    shape: TreeShape, distributions: Float[Tensor, "1 V"], limit: Limit, rng: Rng | None, read: Read
) -> tuple[DraftTree, list[int]]:
    """Grow a draft tree level by level, with a forward of the draft over each level except the last.

    Args:
        shape: shape of the tree.
        distributions: the draft's distribution at the root.
        limit: largest depth and number of nodes of the proposal.
        rng: the randomness of this generation; None under greedy decoding.
        read: runs a forward of the draft.

    Returns:
        The tree of all nodes, in the order in which they are read, and the places of those to propose, as for
            `DraftTree.subset`.
    """
    levels: list[Level] = []
    parents: list[int] = []
    above = [0]
    # Row i marks the nodes that node i of the level above sees, among all nodes read so far. The root sees none.
    visible = torch.ones(1, 0, dtype=torch.bool)
    while len(levels) < limit.depth and shape.more(levels, limit):
        if levels:
            visible = torch.cat([visible[list(levels[-1].rows)], torch.eye(len(above), dtype=torch.bool)], 1)
            distributions = read(levels[-1], visible, len(levels))
        level = shape.grow(distributions, levels, limit, rng)
        del distributions  # they are as wide as the vocabulary: free them before the next level's are computed
        if not len(level):
            break
        parents += [above[row] for row in level.rows]
        above = list(range(len(parents) - len(level) + 1, len(parents) + 1))
        levels.append(level)
    if not levels:
        return DraftTree.empty(), []
    probs = [level.probs for level in levels if level.probs is not None]
    grown = DraftTree(
        torch.cat([level.tokens for level in levels]), torch.tensor(parents), torch.cat(probs) if probs else None
    )
    if host_tokens := [token for level in levels for token in level.host_tokens]:
        grown.set_host_tokens(host_tokens)
    return grown, shape.select(levels, limit)


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A tree with a fixed number of continuations of each node at a depth, filled level by level up to `nodes`.

    Under greedy decoding the continuations are the draft's most probable tokens. With sampling they are drawn from the
    draft's distribution without replacement, and `probs` holds the distribution that each was drawn from.

    Attributes:
        branching: number of continuations of each node, by depth. Its length is the tree's depth.
        nodes: largest number of proposals in the tree.

    Raises:
        ValueError: `branching` is empty, or a number is below 1.
    """

    branching: tuple[int, ...]
    nodes: int = 32

    def __post_init__(self) -> None:
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"branching is {self.branching}: it needs one number of at least 1 for each depth")
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: a tree needs at least 1")

    def grow(
        self, distributions: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None
    ) -> Level:
        room = min(self.nodes, limit.nodes) - sum(map(len, above))
        return _continue(distributions, self.branching[len(above)], room, rng)

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return len(above) < len(self.branching) and sum(map(len, above)) < min(self.nodes, limit.nodes)

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        return list(range(sum(map(len, levels))))


@dataclass(frozen=True, slots=True)
class Chain:
    """A tree with one continuation at each depth, as deep as the limit allows."""

    def grow(
        self, distributions: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None
    ) -> Level:
        return _continue(distributions, 1, limit.nodes - len(above), rng)

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return len(above) < limit.nodes

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        return list(range(len(levels)))


@dataclass(frozen=True, slots=True)
class BestFirstTree:
    """A tree of the most probable paths under the draft (as in EAGLE-2, Li et al. 2024).

    Proposals are the most probable tokens, not draws, so they have no `probs`. Pruning drawn tokens by probability
    would change the distribution that they were drawn from.

    Attributes:
        nodes: largest number of proposals in the tree.
        threshold: least probability of a path under the draft, from 0 to below 1.

    Raises:
        ValueError: `nodes` is below 1, or `threshold` is outside [0, 1).
    """

    nodes: int = 32
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: a tree needs at least 1")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}: a path's probability must be from 0 to below 1")

    def grow(
        self, distributions: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None
    ) -> Level:
        room = min(self.nodes, limit.nodes)
        ranked = distributions.log().topk(min(room, distributions.shape[1]), dim=1)
        parents = above[-1].scores if above else (0.0,)
        assert parents is not None
        scores = (
            ranked.values.double() + moved(torch.tensor(parents, dtype=torch.float64), ranked.values.device)[:, None]
        )
        best = scores.flatten().topk(min(room, scores.numel()))
        tokens = ranked.indices.flatten()[best.indices]
        # One copy brings all values to the host.
        values, places, host_tokens = torch.stack([best.values, best.indices.double(), tokens.double()]).tolist()
        # If the proposals so far fill the room, a candidate must be more probable than the least probable of them.
        proposed = sorted((s for level in above for s in level.scores or ()), reverse=True)
        floor = proposed[room - 1] if len(proposed) >= room > 0 else -math.inf
        cut = math.log(self.threshold) if self.threshold else -math.inf
        count = sum(value >= cut and value > floor for value in values)  # they descend
        width = ranked.indices.shape[1]
        return Level(
            tokens[:count],
            [int(place) // width for place in places[:count]],
            scores=values[:count],
            host_tokens=[int(token) for token in host_tokens[:count]],
        )

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return True

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        scores = [score for level in levels for score in level.scores or ()]
        # The sort is stable: of equally probable paths the shorter one comes first. So no node precedes its ancestors.
        best = sorted(range(len(scores)), key=lambda node: -scores[node])[: min(self.nodes, limit.nodes)]
        return sorted(best)


def _continue(distributions: Float[Tensor, "rows V"], branches: int, room: int, rng: Rng | None) -> Level:
    """Return a level with continuations of each row: the most probable tokens, or draws without replacement.

    Args:
        distributions: the draft's distribution at each row.
        branches: number of continuations of each row.
        room: largest number of continuations of all rows together. The last rows are cut.
        rng: the source of the draws; None takes the most probable tokens.
    """
    branches = min(branches, distributions.shape[1])
    rows = [row for row in range(len(distributions)) for _ in range(branches)][: max(room, 0)]
    if rng is None:
        return Level(distributions.topk(branches, dim=1).indices.flatten()[: len(rows)], rows)
    left = distributions[: -(-len(rows) // branches)]
    if branches == 1:
        # A row without mass is that of a draft that overflowed: its draw is rejected, and changes no distribution.
        return Level(rng.draw(left).clamp(min=0), rows, left)
    drawn, drawn_from = [], []
    for _ in range(branches):
        tokens = rng.draw(left).clamp(min=0)
        drawn.append(tokens)
        drawn_from.append(left)
        left = left.scatter(1, tokens[:, None], 0.0)
        mass = left.sum(1, keepdim=True)
        left = left / mass.where(mass > 0, 1.0)
    tokens = torch.stack(drawn, 1).flatten()[: len(rows)]
    probs = torch.stack(drawn_from, 1).flatten(0, 1)[: len(rows)]
    # A distribution over fewer tokens than `branches` has no mass left for the last draws. These are no proposals.
    real = [place for place, mass in enumerate(probs.sum(1).tolist()) if mass > 0]
    return Level(picked(tokens, real), [rows[place] for place in real], picked(probs, real))
