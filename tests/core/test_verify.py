"""The acceptance rule, proven by enumeration and not by sampling.

Distributions are fractions, and every random decision is enumerated. The distribution of the output text must equal the
target's exactly.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdecode import DraftTree
from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng
from specdecode.core.verify import accept, walk
from specdecode.drafters.tree_shapes import Chain, StaticTree
from tests.helpers.enumeration import BranchRng, distribution_of
from tests.helpers.strategies import trees

Distribution = Any  # an array of fractions
Path = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A distribution of the next token for every path: arbitrary, with some tokens impossible."""

    name: str
    vocabulary: int
    impossible: float = 0.2

    def __call__(self, path: Path) -> Distribution:
        return arbitrary_distribution(self, path)


@functools.cache
def arbitrary_distribution(model: Model, path: Path) -> Distribution:
    generator = random.Random(f"{model.name}{path}")
    weights = [generator.randint(1, 5) * (generator.random() >= model.impossible) for _ in range(model.vocabulary)]
    weights[generator.randrange(model.vocabulary)] += 1
    distribution = np.array([Fraction(weight, sum(weights)) for weight in weights], dtype=object)
    distribution.flags.writeable = False
    return distribution


@dataclass
class Draft:
    """A growing tree: each node's token, parent, path, and the distribution that is passed on for it."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)
    paths: list[Path] = field(default_factory=lambda: [()])

    def add(self, parent: int, token: int, distribution: Distribution) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.distributions.append(distribution)
        self.paths.append((*self.paths[parent], token))

    @property
    def children(self) -> list[list[int]]:
        nodes = range(1, len(self.tokens) + 1)
        return [[node for node in nodes if self.parents[node - 1] == parent] for parent in range(len(self.paths))]


# Adds the children of one node: (draft, node, distribution of the draft model there, number of children, rng).
Siblings = Callable[[Draft, int, Distribution, int, BranchRng], None]


def independent(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    for _ in range(count):
        draft.add(node, int(rng.draw(q)), q)


def without_replacement(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    for _ in range(min(count, (q > 0).sum())):
        token = int(rng.draw(q))
        draft.add(node, token, q)
        left = q.copy()
        left[token] = Fraction(0)
        q = left / left.sum() if left.sum() else left


def most_probable(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    for token in np.argsort(-q)[:count].tolist():
        draft.add(node, token, None)


def first_distribution_for_all(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    """Wrong: draw without replacement, but pass the whole distribution on for each sibling."""
    before = len(draft.distributions)
    without_replacement(draft, node, q, count, rng)
    draft.distributions[before:] = [q] * (len(draft.distributions) - before)


def narrowed_distributions_for_all(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    """Wrong: draw independently, but pass on the distributions of drawing without replacement."""
    for _ in range(count):
        token = int(rng.draw(q))
        distribution = q.copy()
        distribution[[t for t, p in zip(draft.tokens, draft.parents, strict=True) if p == node and t != token]] = (
            Fraction(0)
        )
        draft.add(node, token, distribution / distribution.sum())


def distribution_before_top_k(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    """Wrong: draw from the two most probable tokens, but pass on the distribution before that cut."""
    narrowed = q.copy()
    narrowed[np.argsort(-q)[2:]] = Fraction(0)
    for _ in range(count):
        draft.add(node, int(rng.draw(narrowed / narrowed.sum())), q)


def certain_but_with_a_distribution(draft: Draft, node: int, q: Distribution, count: int, rng: BranchRng) -> None:
    """Wrong: take the most probable tokens without a draw, but pass on distributions as if drawn."""
    before = len(draft.distributions)
    most_probable(draft, node, q, count, rng)
    draft.distributions[before:] = [q] * (len(draft.distributions) - before)


def emitted_distribution(
    target: Model,
    model: Model,
    siblings: Siblings,
    branching: tuple[int, ...],
    length: int,
    *,
    without_probs: bool = False,
) -> dict[Path, Fraction]:
    """Return the distribution of the first output tokens: drafted level by level, verified, and completed by the
    target.
    """

    def run(rng: BranchRng) -> Path:
        draft = Draft()
        level = [0]
        for count in branching:
            grown = len(draft.paths)
            for node in level:
                siblings(draft, node, model(draft.paths[node]), count, rng)
            level = list(range(grown, len(draft.paths)))
        probs = None if without_probs or siblings is most_probable else draft.distributions
        distributions = [target(path) for path in draft.paths]
        text = tuple(walk(draft.tokens, draft.children, probs, distributions, rng).tokens)
        while len(text) < length:
            text = (*text, int(rng.draw(target(text))))
        return text[:length]

    return distribution_of(run)


def target_distribution(target: Model, length: int) -> dict[Path, Fraction]:
    distribution = {
        text: Fraction(np.prod([target(text[:i])[token] for i, token in enumerate(text)]))
        for text in itertools.product(range(target.vocabulary), repeat=length)
    }
    return {text: weight for text, weight in distribution.items() if weight}


SHAPES = {
    "chain-1": (1,),
    "chain-2": (1, 1),
    "chain-3": (1, 1, 1),
    "two-siblings": (2,),
    "three-siblings": (3,),
    "tree-2-1": (2, 1),
    "tree-1-2": (1, 2),
    "tree-2-2": (2, 2),
    "tree-3-1": (3, 1),
}


@pytest.mark.parametrize("siblings", [independent, without_replacement, most_probable], ids=lambda f: f.__name__)
@pytest.mark.parametrize("branching", SHAPES.values(), ids=SHAPES.keys())
def test_the_target_s_distribution_is_left_untouched(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against any flaw of the rule: a residual that is not renormalised or restarts for each sibling, a bonus
    token drawn from a residual, or a distribution of another node. Draft and target disagree on which tokens are
    possible.
    """
    target, model = Model("target", 3), Model("draft", 3)
    length = min(len(branching) + 1, 3)
    assert emitted_distribution(target, model, siblings, branching, length) == target_distribution(target, length)


@pytest.mark.parametrize("siblings", [independent, without_replacement, most_probable], ids=lambda f: f.__name__)
def test_a_larger_vocabulary_changes_nothing(siblings: Siblings) -> None:
    """Guards against a proof that holds only where three siblings are the whole vocabulary."""
    target, model = Model("target", 4, impossible=0.0), Model("draft", 4, impossible=0.0)
    assert emitted_distribution(target, model, siblings, (3,), 2) == target_distribution(target, 2)


@pytest.mark.parametrize("siblings", [independent, without_replacement], ids=lambda f: f.__name__)
@pytest.mark.parametrize("branching", [(1, 1), (3,), (2, 1)], ids=str)
def test_a_drawn_proposal_may_go_without_its_distribution(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against the belief that only top-k trees may omit their distributions. In any tree, a one-hot distribution
    accepts the target's own choice and nothing else. A distribution only raises acceptance.
    """
    target, model = Model("target", 3), Model("draft", 3)
    assert emitted_distribution(target, model, siblings, branching, 2, without_probs=True) == target_distribution(
        target, 2
    )


@pytest.mark.parametrize(
    "siblings",
    [
        first_distribution_for_all,
        narrowed_distributions_for_all,
        distribution_before_top_k,
        certain_but_with_a_distribution,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("branching", [(2,), (2, 1)], ids=str)
def test_a_distribution_that_was_not_drawn_from_is_found_out(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against a proof that passes anything: with another distribution than the one drawn from, it must fail."""
    target, model = Model("target", 4, impossible=0.0), Model("draft", 4, impossible=0.0)
    distribution, wrong = target_distribution(target, 2), emitted_distribution(target, model, siblings, branching, 2)
    assert sum(wrong.values()) == 1
    assert wrong != distribution


def test_the_draft_s_own_distribution_is_always_accepted() -> None:
    """Guards against an inverted ratio, and proposals rejected where draft and target agree."""
    model = Model("both", 3)

    def accepted(rng: BranchRng) -> int:
        draft = Draft()
        for node in range(3):
            independent(draft, node, model(draft.paths[node]), 1, rng)
        distributions = [model(path) for path in draft.paths]
        return len(walk(draft.tokens, draft.children, draft.distributions, distributions, rng).path)

    assert distribution_of(accepted) == {3: 1}


@given(tree=trees(min_nodes=0, max_nodes=14, tokens=3), choices=st.data())
@settings(max_examples=200)
def test_following_the_argmax_is_the_rule_for_certain_targets(tree: DraftTree, choices: st.DataObject) -> None:
    """Guards against a fast path that differs from the rule: another sibling of two with the same token, a path below a
    rejected node, or a bonus from the wrong node.
    """
    size = len(tree) + 1
    token = st.integers(0, 2)
    argmax = torch.tensor(choices.draw(st.lists(token, min_size=size, max_size=size)))
    distributions = torch.nn.functional.one_hot(argmax, 3).double()
    fast = accept(tree, argmax, Rng(0))
    assert fast == accept(tree, distributions, Rng(0))
    # To a target that is certain, the proposals' distributions make no difference.
    drawn = torch.rand(len(tree), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    drawn /= drawn.sum(-1, keepdim=True)
    assert fast == accept(DraftTree(tree.tokens, tree.parents, drawn), distributions, Rng(0))
    assert fast.tokens[-1] == argmax[fast.path[-1] if fast.path else 0]

    # On tensors, what is computed before the walk must be what the walk itself computes.
    uncertain = torch.rand(size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    uncertain /= uncertain.sum(-1, keepdim=True)
    for probs in (drawn, None):
        walked = walk(tree.host_tokens, tree.children(), probs, uncertain, Rng(2))
        assert accept(DraftTree(tree.tokens, tree.parents, probs), uncertain, Rng(2)) == walked


def test_the_path_leads_from_the_root_to_the_last_accepted_node() -> None:
    """Guards against a path listed by token or by depth instead of by node: wrong slots would be kept."""
    tree = DraftTree(torch.tensor([4, 7, 1, 7, 2]), torch.tensor([0, 0, 2, 2, 4]))
    acceptance = accept(tree, torch.tensor([7, 0, 7, 0, 2, 9]), Rng(0))
    assert acceptance.path == [2, 4, 5]
    assert acceptance.tokens == [7, 7, 2, 9]


def test_a_draft_that_overflowed_changes_no_distribution() -> None:
    """Guards against a proposal without distribution that is accepted: it may be any token."""
    nowhere = torch.full((1, 4), torch.nan, dtype=torch.float64)
    for shape in (Chain(), StaticTree((1,))):
        level = shape.grow(nowhere, [], Limit(1, 1), Rng(0))
        tree = DraftTree(level.tokens, torch.zeros(len(level), dtype=torch.long), level.probs)
        p = torch.tensor([[0.5, 0.0, 0.0, 0.5]] * 2, dtype=torch.float64)
        accepted = [accept(tree, p, Rng(seed)) for seed in range(20)]
        assert not any(acceptance.path for acceptance in accepted)
        assert {acceptance.tokens[0] for acceptance in accepted} == {0, 3}


def test_equal_distributions_up_to_rounding_still_give_a_token() -> None:
    """Guards against a division by zero where p and q differ by rounding alone and the proposal is rejected."""
    p = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    tree = DraftTree(torch.tensor([1]), torch.tensor([0]), torch.stack([p * (1 + 2**-50)]))

    class Unlucky(Rng):
        def coin(self, probability: object) -> bool:
            return False

    assert accept(tree, torch.stack([p, p]), Unlucky(0)).tokens[0] in (1, 2)
