"""The shape of a model's draft: which continuations of which nodes are proposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """Proposals of one depth.

    Attributes:
        tokens: [c] token ids.
        rows: for each, the row of the level above (at first the root) that it continues.
        probs: [c, V] the law that each was drawn from, given its earlier siblings; None if deterministic.
        scores: log-probability of each one's path under the draft; None if the shape has no use for them.
    """

    tokens: Int[Tensor, " c"]
    rows: Sequence[int]
    probs: Float[Tensor, "c V"] | None = None
    scores: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.rows)


class TreeShape(Protocol):
    """Grows a tree level by level; every level costs one draft forward over its nodes."""

    def grow(self, laws: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None) -> Level:
        """The next level, under the last of the levels `above`, from the draft's law at each of that one's nodes.

        `rng` is None under greedy decoding. An empty level ends the tree.
        """
        ...

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        """Whether another level may follow; asked before the forward over the last one is paid."""
        ...

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        """Which of the levels' nodes, numbered through from 0, are proposed; ancestors of a chosen node are too."""
        ...


Read = Callable[[Level, Bool[Tensor, "rows read"], int], Float[Tensor, "rows V"]]
"""The draft's laws at the nodes of a level, from these, which of the nodes that have been read (the level's own
included, at the end) each of them sees, and their depth."""


def grow_tree(
    shape: TreeShape, laws: Float[Tensor, "1 V"], limit: Limit, rng: Rng | None, read: Read
) -> tuple[DraftTree, DraftTree]:
    """Grow a draft level by level, by a forward of the draft over each level but the last.

    Args:
        shape: of the draft.
        laws: the draft's law at the root.
        limit: the most that may be proposed.
        rng: None under greedy decoding.
        read: a forward.

    Returns:
        All nodes, in the order in which they are read, and the tree of those that are proposed.
    """
    levels: list[Level] = []
    parents: list[int] = []
    above = [0]
    # Which nodes that have been read each node of the level above sees; the root sees none.
    visible = torch.ones(1, 0, dtype=torch.bool)
    while len(levels) < limit.depth and shape.more(levels, limit):
        if levels:
            visible = torch.cat([visible[list(levels[-1].rows)], torch.eye(len(above), dtype=torch.bool)], 1)
            laws = read(levels[-1], visible, len(levels))
        level = shape.grow(laws, levels, limit, rng)
        del laws  # as wide as the vocabulary: no two levels' at once
        if not len(level):
            break
        parents += [above[row] for row in level.rows]
        above = list(range(len(parents) - len(level) + 1, len(parents) + 1))
        levels.append(level)
    if not levels:
        return DraftTree.empty(), DraftTree.empty()
    probs = [level.probs for level in levels if level.probs is not None]
    grown = DraftTree(
        torch.cat([level.tokens for level in levels]), torch.tensor(parents), torch.cat(probs) if probs else None
    )
    chosen = shape.select(levels, limit)
    if len(chosen) == len(grown):
        return grown, grown
    renumbered = {0: 0} | {node + 1: i for i, node in enumerate(chosen, start=1)}
    return grown, DraftTree(grown.tokens[chosen], torch.tensor([renumbered[parents[node]] for node in chosen]))


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A fixed number of continuations at each depth, level by level until `nodes` are proposed.

    Under greedy decoding the continuations are the draft's most probable tokens. With sampling they are drawn from its
    law without replacement, and the law that each was drawn from goes with it.

    Attributes:
        branching: continuations of every node, depth by depth; its length is the tree's depth.
        nodes: proposals in all.

    Raises:
        ValueError: no level, or a number below 1.
    """

    branching: tuple[int, ...]
    nodes: int = 32

    def __post_init__(self) -> None:
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"branching is {self.branching}: it needs one number of at least 1 for each depth")
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: a tree needs at least 1")

    def grow(self, laws: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None) -> Level:
        room = min(self.nodes, limit.nodes) - sum(map(len, above))
        return _continue(laws, self.branching[len(above)], room, rng)

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return len(above) < len(self.branching) and sum(map(len, above)) < min(self.nodes, limit.nodes)

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        return list(range(sum(map(len, levels))))


@dataclass(frozen=True, slots=True)
class Chain:
    """One continuation a level, as deep as the limit allows."""

    def grow(self, laws: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None) -> Level:
        return _continue(laws, 1, limit.nodes - len(above), rng)

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return len(above) < limit.nodes

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        return list(range(len(levels)))


@dataclass(frozen=True, slots=True)
class BestFirstTree:
    """The `nodes` paths that the draft finds most probable, none below `threshold` (as in EAGLE-2, Li et al. 2024).

    Proposals are the most probable tokens, not draws, so no law goes with them: pruning a drawn sibling for its
    probability would make the law that it was drawn from untrue.

    Attributes:
        nodes: proposals in all.
        threshold: least probability of a path under the draft.

    Raises:
        ValueError: nodes below 1 or a threshold outside [0, 1).
    """

    nodes: int = 32
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: a tree needs at least 1")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}: a path's probability must be from 0 to below 1")

    def grow(self, laws: Float[Tensor, "rows V"], above: Sequence[Level], limit: Limit, rng: Rng | None) -> Level:
        room = min(self.nodes, limit.nodes)
        ranked = laws.log().topk(min(room, laws.shape[1]), dim=1)
        parents = above[-1].scores if above else (0.0,)
        assert parents is not None
        scores = ranked.values.double() + torch.tensor(parents, dtype=torch.float64, device=laws.device)[:, None]
        best = scores.flatten().topk(min(room, scores.numel()))
        places, values = best.indices.tolist(), best.values.tolist()
        # A candidate must beat what is proposed already, where that fills the room.
        so_far = sorted((s for level in above for s in level.scores or ()), reverse=True)
        floor = so_far[room - 1] if len(so_far) >= room else -torch.inf
        cut = torch.tensor(self.threshold).log().item()
        chosen = [(place, value) for place, value in zip(places, values, strict=True) if value >= cut and value > floor]
        width = ranked.indices.shape[1]
        return Level(
            ranked.indices.flatten()[[place for place, _ in chosen]],
            [place // width for place, _ in chosen],
            scores=[value for _, value in chosen],
        )

    def more(self, above: Sequence[Level], limit: Limit) -> bool:
        return True

    def select(self, levels: Sequence[Level], limit: Limit) -> list[int]:
        scores = [score for level in levels for score in level.scores or ()]
        # The sort is stable: of equal paths the shorter comes first, so no node is chosen before its ancestors.
        best = sorted(range(len(scores)), key=lambda node: -scores[node])[: min(self.nodes, limit.nodes)]
        return sorted(best)


def _continue(laws: Float[Tensor, "rows V"], each: int, room: int, rng: Rng | None) -> Level:
    """`each` continuations of every row, at most `room` in all: the most probable, or drawn without replacement."""
    each = min(each, laws.shape[1])
    rows = [row for row in range(len(laws)) for _ in range(each)][: max(room, 0)]
    if rng is None:
        return Level(laws.topk(each, dim=1).indices.flatten()[: len(rows)], rows)
    drawn, given = [], []
    left = laws[: -(-len(rows) // each)]
    for _ in range(each):
        tokens = rng.draw(left).clamp(min=0)
        drawn.append(tokens)
        given.append(left)
        left = left.scatter(1, tokens[:, None], 0.0)
        mass = left.sum(1, keepdim=True)
        left = left / mass.where(mass > 0, 1.0)
    tokens = torch.stack(drawn, 1).flatten()[: len(rows)]
    probs = torch.stack(given, 1).flatten(0, 1)[: len(rows)]
    # Where a law has fewer tokens than were to be drawn, the draws from nothing are not proposals.
    real = (probs.sum(1) > 0).tolist()
    return Level(tokens[real], [row for row, keep in zip(rows, real, strict=True) if keep], probs[real])
