from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from specdecode import DraftTree, generate
from tests.helpers.strategies import trees


def ancestry(tree: DraftTree, node: int) -> list[int]:
    """Return the nodes from this one up to the root, both included, walked one by one."""
    path = [node]
    while path[-1]:
        path.append(int(tree.parents[path[-1] - 1]))
    return path


@given(trees())
def test_a_node_sees_itself_and_its_ancestors_only(tree: DraftTree) -> None:
    """Guards against attention between siblings or cousins, and against paths longer than the doubling covers."""
    expected = torch.zeros(len(tree) + 1, len(tree) + 1, dtype=torch.bool)
    for node in range(len(tree) + 1):
        expected[node, ancestry(tree, node)] = True
    assert torch.equal(tree.visibility, expected)
    assert tree.depths.tolist() == [len(ancestry(tree, node)) - 1 for node in range(len(tree) + 1)]
    assert tree.depth == max(tree.depths.tolist())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64])
def test_a_chain_of_any_length_is_as_deep_as_it_is_long(length: int) -> None:
    """Guards against one squaring too few in the visibility: the end of a chain would not see the root."""
    chain = DraftTree.chain(torch.arange(length))
    assert torch.equal(chain.visibility, torch.ones(length + 1, length + 1, dtype=torch.bool).tril())
    assert chain.depth == len(chain) == length


def test_the_empty_tree_is_its_root() -> None:
    """Guards against a maximum or a matrix power over nothing: autoregressive decoding uses the empty tree."""
    empty = DraftTree.empty()
    assert len(empty) == empty.depth == 0
    assert empty.visibility.tolist() == [[True]]
    assert empty.children() == [[]]
    assert empty.clip(0) is empty


@given(trees())
def test_children_stand_in_the_order_in_which_they_were_proposed(tree: DraftTree) -> None:
    """Guards against reordered siblings: the distribution of each sibling holds only in the order of drawing."""
    assert tree.children() == [
        [node for node in range(1, len(tree) + 1) if tree.parents[node - 1] == parent]
        for parent in range(len(tree) + 1)
    ]


@given(trees(), st.integers(0, 6))
def test_clipping_keeps_every_path_down_to_the_depth(tree: DraftTree, depth: int) -> None:
    """Guards against parents that are not renumbered when an earlier node is removed, and distributions that lose their
    node.
    """
    distributions = torch.rand(len(tree), 5, dtype=torch.float64)
    clipped = DraftTree(tree.tokens, tree.parents, distributions).clip(depth)

    def paths(of: DraftTree) -> list[list[int]]:
        return [[int(of.tokens[i - 1]) for i in ancestry(of, node)[:-1]] for node in range(1, len(of) + 1)]

    kept = [node for node in range(1, len(tree) + 1) if len(ancestry(tree, node)) - 1 <= depth]
    assert paths(clipped) == [path for path in paths(tree) if len(path) <= depth]
    assert clipped.probs is not None
    assert torch.equal(clipped.probs, distributions[[node - 1 for node in kept]])
    assert tree.clip(depth).probs is None


def test_declared_shapes_are_checked_in_these_tests() -> None:
    """Guards against an import hook that comes too late: no annotation would be checked, and no other test would show
    it.
    """
    with pytest.raises(TypeCheckError, match="parameter 'probs'"):
        DraftTree(torch.tensor([5, 6]), torch.tensor([0, 1]), torch.zeros(3, 4))
    with pytest.raises(TypeCheckError, match="Drafter"):
        generate(None, [1], drafter="lookup")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "parents", "probs", "sentence"),
    [
        ([5, 6], [0], None, r"one parent for each token, got \(2,\) tokens and \(1,\) parents"),
        ([[5, 6]], [[0, 1]], None, r"one parent for each token, got \(1, 2\) tokens"),
        ([5, 6], [0, 2], None, r"parents\[1\] is 2: a parent must come before its child"),
        ([5, 6], [1, 0], None, r"parents\[0\] is 1"),
        ([5, 6], [0, -1], None, r"parents\[1\] is -1"),
        ([5, 6], [0, 1], [[0.5, 0.5]], r"2 tokens needs probs of shape \[2, V\], got \(1, 2\)"),
        ([5, 6], [0, 1], [0.5, 0.5], r"2 tokens needs probs of shape \[2, V\], got \(2,\)"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list, parents: list, probs: list | None, sentence: str) -> None:
    """Guards against a malformed proposal that decodes to nonsense instead of raising an error."""
    distribution = None if probs is None else torch.tensor(probs)
    with pytest.raises(ValueError, match=sentence):
        DraftTree(torch.tensor(tokens), torch.tensor(parents), distribution)
