"""The draft tree: the tokens that a drafter proposes. A chain is a tree, and so is an empty proposal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.core.transfer import picked


@dataclass(frozen=True, slots=True, eq=False)
class DraftTree:
    """Proposed tokens as a tree below the root, the last committed token.

    The root is node 0, and ``tokens[i]`` is node i+1. Parents precede their children. Siblings are tried in the order
    of their numbers.

    Attributes:
        tokens: [N] the proposed token ids.
        parents: [N] the node that each proposal follows, ``0 <= parents[i] <= i``.
        probs: [N, V] the distribution that each token was drawn from, given its earlier siblings; None for
            deterministic proposals, which have one-hot distributions.

    Raises:
        ValueError: the shapes disagree, or a parent does not precede its child. The values of `parents` are checked
            only on the CPU, where that needs no device synchronisation.
    """

    tokens: Int[Tensor, " N"]
    parents: Int[Tensor, " N"]
    probs: Float[Tensor, "N V"] | None = None
    _host_tokens: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.parents.shape != self.tokens.shape:
            raise ValueError(
                f"a draft tree needs one parent for each token, got {tuple(self.tokens.shape)} tokens"
                f" and {tuple(self.parents.shape)} parents"
            )
        if self.probs is not None and (self.probs.ndim != 2 or len(self.probs) != len(self)):
            raise ValueError(
                f"a draft tree of {len(self)} tokens needs probs of shape [{len(self)}, V],"
                f" got {tuple(self.probs.shape)}"
            )
        if self.parents.device.type == "cpu":
            for node, parent in enumerate(self.parents.tolist()):
                if not 0 <= parent <= node:
                    raise ValueError(
                        f"parents[{node}] is {parent}: a parent must come before its child (0 to {node}, 0 is the root)"
                    )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def host_tokens(self) -> list[int]:
        """The tokens on the host. The first access waits for the device, unless `set_host_tokens` was called before."""
        if not self._host_tokens and len(self):
            self._host_tokens.extend(self.tokens.tolist())
        return self._host_tokens

    def set_host_tokens(self, tokens: list[int]) -> None:
        """Store the tokens, if they were already copied to the host together with other values."""
        self._host_tokens[:] = tokens

    @staticmethod
    def empty() -> DraftTree:
        """Return the tree without proposals, which gives a step of autoregressive decoding."""
        none = torch.empty(0, dtype=torch.long)
        return DraftTree(none, none)

    @staticmethod
    def chain(tokens: Int[Tensor, " N"], probs: Float[Tensor, "N V"] | None = None) -> DraftTree:
        """Return the tree in which each token follows the token before it."""
        return DraftTree(tokens, torch.arange(len(tokens)), probs)

    @property
    def visibility(self) -> Bool[Tensor, "nodes nodes"]:
        """The nodes that each node may attend to: row i marks node i, its ancestors and the root."""
        size = len(self) + 1
        visible = torch.eye(size, device=self.parents.device)
        visible[torch.arange(1, size, device=visible.device), self.parents] = 1.0
        # Squaring the one-step relation doubles the distance it covers.
        for _ in range(max(size - 2, 0).bit_length()):
            visible = (visible @ visible).clamp(max=1.0)
        return visible > 0

    @property
    def depths(self) -> Int[Tensor, " nodes"]:
        """Distance of each node from the root. The root has depth 0."""
        return self.visibility.sum(1) - 1

    @property
    def depth(self) -> int:
        """Number of proposed tokens on the longest path from the root."""
        depths = [0]
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1)
        return max(depths)

    def children(self) -> list[list[int]]:
        """Return the children of each node, the root first, in the order in which they are tried."""
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents.tolist(), start=1):
            children[parent].append(node)
        return children

    def clip(self, depth: int) -> DraftTree:
        """Return the tree without the nodes deeper than ``depth``."""
        return self.subset([i for i, its_depth in enumerate(self.depths[1:].tolist()) if its_depth <= depth])

    def subset(self, places: Sequence[int]) -> DraftTree:
        """Return the tree of some proposals.

        Args:
            places: indices into `tokens`, ascending. All ancestors of a proposal must be among them.
        """
        if len(places) == len(self):
            return self
        parents, renumbered = self.parents.tolist(), {0: 0} | {place + 1: new for new, place in enumerate(places, 1)}
        tree = DraftTree(
            picked(self.tokens, places),
            torch.tensor([renumbered[parents[place]] for place in places], dtype=torch.long),
            None if self.probs is None else picked(self.probs, places),
        )
        if self._host_tokens:
            tree.set_host_tokens([self._host_tokens[place] for place in places])
        return tree
