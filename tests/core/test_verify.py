"""The acceptance rule is proven, not sampled: laws are fractions, every random decision is enumerated, and the law of
the text that comes out must equal the target's to the last digit."""

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
from specdecode.core.sampling import Rng
from specdecode.core.verify import accept, walk
from tests.helpers.enumeration import BranchRng, law_of
from tests.helpers.strategies import trees

Law = Any  # an array of fractions
Path = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A law of the next token for every path: arbitrary, with some tokens impossible."""

    name: str
    vocabulary: int
    impossible: float = 0.2

    def __call__(self, path: Path) -> Law:
        return arbitrary_law(self, path)


@functools.cache
def arbitrary_law(model: Model, path: Path) -> Law:
    generator = random.Random(f"{model.name}{path}")
    weights = [generator.randint(1, 5) * (generator.random() >= model.impossible) for _ in range(model.vocabulary)]
    weights[generator.randrange(model.vocabulary)] += 1
    law = np.array([Fraction(weight, sum(weights)) for weight in weights], dtype=object)
    law.flags.writeable = False
    return law


@dataclass
class Draft:
    """A tree under growth: each node's token, parent, path, and the law that is handed over for it."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    paths: list[Path] = field(default_factory=lambda: [()])

    def add(self, parent: int, token: int, law: Law) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.laws.append(law)
        self.paths.append((*self.paths[parent], token))

    @property
    def children(self) -> list[list[int]]:
        nodes = range(1, len(self.tokens) + 1)
        return [[node for node in nodes if self.parents[node - 1] == parent] for parent in range(len(self.paths))]


# How the children of one node come about: (draft, node, law of the draft model there, how many, rng).
Siblings = Callable[[Draft, int, Law, int, BranchRng], None]


def independent(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    for _ in range(count):
        draft.add(node, int(rng.draw(q)), q)


def without_replacement(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    for _ in range(min(count, (q > 0).sum())):
        token = int(rng.draw(q))
        draft.add(node, token, q)
        left = q.copy()
        left[token] = Fraction(0)
        q = left / left.sum() if left.sum() else left


def most_probable(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    for token in np.argsort(-q)[:count].tolist():
        draft.add(node, token, None)


def first_law_for_all(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    """Wrong: drawn without replacement, but handed over as if each had been drawn from the whole law."""
    before = len(draft.laws)
    without_replacement(draft, node, q, count, rng)
    draft.laws[before:] = [q] * (len(draft.laws) - before)


def narrowed_laws_for_all(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    """Wrong: drawn independently, but handed over as if without replacement."""
    for _ in range(count):
        token = int(rng.draw(q))
        law = q.copy()
        law[[t for t, p in zip(draft.tokens, draft.parents, strict=True) if p == node and t != token]] = Fraction(0)
        draft.add(node, token, law / law.sum())


def law_before_top_k(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    """Wrong: drawn from the two most probable tokens, but handed over with the law before that cut."""
    narrowed = q.copy()
    narrowed[np.argsort(-q)[2:]] = Fraction(0)
    for _ in range(count):
        draft.add(node, int(rng.draw(narrowed / narrowed.sum())), q)


def certain_but_with_a_law(draft: Draft, node: int, q: Law, count: int, rng: BranchRng) -> None:
    """Wrong: the most probable tokens, not drawn at all, but handed over as if drawn."""
    before = len(draft.laws)
    most_probable(draft, node, q, count, rng)
    draft.laws[before:] = [q] * (len(draft.laws) - before)


def emitted_law(
    target: Model, model: Model, siblings: Siblings, branching: tuple[int, ...], length: int, *, lawless: bool = False
) -> dict[Path, Fraction]:
    """The law of the first tokens that come out: drafted level by level, verified, and completed by the target."""

    def run(rng: BranchRng) -> Path:
        draft = Draft()
        level = [0]
        for count in branching:
            grown = len(draft.paths)
            for node in level:
                siblings(draft, node, model(draft.paths[node]), count, rng)
            level = list(range(grown, len(draft.paths)))
        probs = None if lawless or siblings is most_probable else draft.laws
        laws = [target(path) for path in draft.paths]
        text = tuple(walk(draft.tokens, draft.children, probs, laws, rng).tokens)
        while len(text) < length:
            text = (*text, int(rng.draw(target(text))))
        return text[:length]

    return law_of(run)


def target_law(target: Model, length: int) -> dict[Path, Fraction]:
    law = {
        text: Fraction(np.prod([target(text[:i])[token] for i, token in enumerate(text)]))
        for text in itertools.product(range(target.vocabulary), repeat=length)
    }
    return {text: weight for text, weight in law.items() if weight}


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
def test_the_target_s_law_is_left_untouched(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against any flaw of the rule: a residual not renormalised, one that starts anew for each sibling, a bonus
    drawn from a residual, a law taken from another node. Draft and target disagree on what is possible at all."""
    target, model = Model("target", 3), Model("draft", 3)
    length = min(len(branching) + 1, 3)
    assert emitted_law(target, model, siblings, branching, length) == target_law(target, length)


@pytest.mark.parametrize("siblings", [independent, without_replacement, most_probable], ids=lambda f: f.__name__)
def test_a_larger_vocabulary_changes_nothing(siblings: Siblings) -> None:
    """Guards against a proof that holds only where three siblings are all there can be."""
    target, model = Model("target", 4, impossible=0.0), Model("draft", 4, impossible=0.0)
    assert emitted_law(target, model, siblings, (3,), 2) == target_law(target, 2)


@pytest.mark.parametrize("siblings", [independent, without_replacement], ids=lambda f: f.__name__)
@pytest.mark.parametrize("branching", [(1, 1), (3,), (2, 1)], ids=str)
def test_a_drawn_proposal_may_go_without_its_law(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against the belief that only top-k trees may be handed over without laws. Whatever the tree, a one-hot
    law accepts the target's own choice and nothing else; a law only lets more be accepted."""
    target, model = Model("target", 3), Model("draft", 3)
    assert emitted_law(target, model, siblings, branching, 2, lawless=True) == target_law(target, 2)


@pytest.mark.parametrize(
    "siblings",
    [first_law_for_all, narrowed_laws_for_all, law_before_top_k, certain_but_with_a_law],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("branching", [(2,), (2, 1)], ids=str)
def test_a_law_that_was_not_drawn_from_is_found_out(branching: tuple[int, ...], siblings: Siblings) -> None:
    """Guards against a proof that proves everything: handed another law than the one drawn from, it must fail."""
    target, model = Model("target", 4, impossible=0.0), Model("draft", 4, impossible=0.0)
    law, wrong = target_law(target, 2), emitted_law(target, model, siblings, branching, 2)
    assert sum(wrong.values()) == 1
    assert wrong != law


def test_the_draft_s_own_law_is_always_accepted() -> None:
    """Guards against a ratio turned upside down, and proposals turned away where draft and target agree."""
    model = Model("both", 3)

    def accepted(rng: BranchRng) -> int:
        draft = Draft()
        for node in range(3):
            independent(draft, node, model(draft.paths[node]), 1, rng)
        laws = [model(path) for path in draft.paths]
        return len(walk(draft.tokens, draft.children, draft.laws, laws, rng).path)

    assert law_of(accepted) == {3: 1}


@given(tree=trees(min_nodes=0, max_nodes=14, tokens=3), choices=st.data())
@settings(deadline=None, max_examples=200)
def test_following_the_argmax_is_the_rule_for_certain_targets(tree: DraftTree, choices: st.DataObject) -> None:
    """Guards against a fast path of its own mind: another sibling of two with the same token, a path that goes on
    below a rejected node, or a bonus from the wrong node."""
    size = len(tree) + 1
    token = st.integers(0, 2)
    argmax = torch.tensor(choices.draw(st.lists(token, min_size=size, max_size=size)))
    laws = torch.nn.functional.one_hot(argmax, 3).double()
    fast = accept(tree, argmax, Rng(0))
    assert fast == accept(tree, laws, Rng(0))
    # A law that came with the proposals makes no difference to a target that is certain.
    drawn = torch.rand(len(tree), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    drawn /= drawn.sum(-1, keepdim=True)
    assert fast == accept(DraftTree(tree.tokens, tree.parents, drawn), laws, Rng(0))
    assert fast.next_token == fast.tokens[-1] == argmax[fast.path[-1] if fast.path else 0]


def test_the_path_leads_from_the_root_to_the_last_accepted_node() -> None:
    """Guards against nodes listed by token or by depth: the slots to keep are found by them."""
    tree = DraftTree(torch.tensor([4, 7, 1, 7, 2]), torch.tensor([0, 0, 2, 2, 4]))
    verdict = accept(tree, torch.tensor([7, 0, 7, 0, 2, 9]), Rng(0))
    assert verdict.path == [2, 4, 5]
    assert verdict.tokens == [7, 7, 2, 9]


def test_equal_laws_up_to_rounding_still_give_a_token() -> None:
    """Guards against a division by zero where p and q differ by rounding alone and the proposal is turned away."""
    p = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    tree = DraftTree(torch.tensor([1]), torch.tensor([0]), torch.stack([p * (1 + 2**-50)]))

    class Unlucky(Rng):
        def coin(self, probability: object) -> bool:
            return False

    assert accept(tree, torch.stack([p, p]), Unlucky(0)).tokens[0] in (1, 2)
