from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from specdecode import LM, DraftTree
from specdecode.core.slots import SlotBatch, Slots
from tests.helpers.models import logits, small
from tests.helpers.strategies import trees

WIDTH = 11
texts = st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=5)


@functools.cache
def model(layers: int) -> LM:
    return small(
        vocab_size=WIDTH, num_hidden_layers=layers, hidden_size=16, num_attention_heads=4, num_key_value_heads=2
    )


class SlotsAndList(RuleBasedStateMachine):
    """Slots behind a real model, beside a plain list of (token, position).

    The model's logits through the slots must equal its logits on the list, read from scratch.
    """

    layers = 2

    @initialize(capacity=st.integers(0, 4))
    def begin(self, capacity: int) -> None:
        """Start with room for only a few tokens, so that most runs outgrow it more than once."""
        self.lm = model(self.layers)
        self.slots = self.lm.new_slots(capacity)
        self.held: list[tuple[int, int]] = []

    @property
    def next_position(self) -> int:
        return self.held[-1][1] + 1 if self.held else 0

    def expected(self, more: list[tuple[int, int]]) -> torch.Tensor:
        tokens, positions = zip(*self.held, *more, strict=True)
        return logits(self.lm.model, tokens, positions)

    @rule(tokens=texts)
    def append(self, tokens: list[int]) -> None:
        positions = list(range(self.next_position, self.next_position + len(tokens)))
        added = list(zip(tokens, positions, strict=True))
        seen = self.lm.forward(self.slots, torch.tensor(tokens), positions=torch.tensor(positions), rows=len(tokens))
        torch.testing.assert_close(seen, self.expected(added)[-len(tokens) :])
        self.held += added

    @rule(stem=texts, tree=trees(max_nodes=7, tokens=WIDTH), data=st.data())
    def accept_a_path_of_a_tree(self, stem: list[int], tree: DraftTree, data: st.DataObject) -> None:
        """Verify a tree behind some pending tokens, check all its branches, and keep one of them, or part of it."""
        root, start = self.slots.length + len(stem) - 1, self.next_position
        if start == self.slots.length:
            seen = self.lm.forward_tree(self.slots, stem, tree)
        else:  # After an eviction, positions no longer follow from the number of slots.
            seen = self.forward_tree_at(start, stem, tree)
        added = [(token, start + i) for i, token in enumerate(stem)]
        deepest = start + len(stem) - 1
        paths = [[node for node in range(1, len(tree) + 1) if row[node]] for row in tree.visibility.tolist()]
        for node, path in enumerate(paths):
            branch = [(int(tree.tokens[n - 1]), deepest + depth) for depth, n in enumerate(path, start=1)]
            torch.testing.assert_close(seen[node], self.expected(added + branch)[-1])
        chosen = data.draw(st.sampled_from(paths))
        self.slots.keep([root + node for node in chosen], after=root + 1)
        self.held += added
        self.held += [(int(tree.tokens[n - 1]), deepest + depth) for depth, n in enumerate(chosen, start=1)]

    def forward_tree_at(self, start: int, stem: list[int], tree: DraftTree) -> torch.Tensor:
        size = len(stem) + len(tree)
        visible = torch.ones(size, size, dtype=torch.bool).tril()
        visible[len(stem) - 1 :, len(stem) - 1 :] = tree.visibility
        positions = torch.cat([torch.arange(len(stem) - 1), len(stem) - 1 + tree.depths]) + start
        return self.lm.forward(
            self.slots,
            torch.cat([torch.tensor(stem), tree.tokens]),
            positions=positions,
            visible=visible,
            rows=len(tree) + 1,
        )

    @rule(share=st.floats(0, 1))
    def roll_back(self, share: float) -> None:
        """Roll back to any prefix, the empty one included."""
        length = round(share * len(self.held))
        self.slots.keep([], after=length)
        del self.held[length:]

    @precondition(lambda self: self.held)
    @rule()
    def stack(self) -> None:
        """Move the keys and values of all layers into one tensor, as static forwards do."""
        self.slots.storage.stack(self.slots.length)
        assert len(self.slots.storage.tensors) == 1

    @invariant()
    def the_next_logits_are_those_of_a_fresh_forward(self) -> None:
        probe = (7, self.next_position)
        seen = self.lm.forward(self.slots, torch.tensor([7]), positions=torch.tensor([probe[1]]))
        torch.testing.assert_close(seen[0], self.expected([probe])[-1])
        self.slots.keep(range(len(self.held)))

    @invariant()
    def slots_are_counted(self) -> None:
        assert self.slots.length == len(self.held) <= self.slots.capacity
        assert self.slots.positions[: self.slots.length].tolist() == [position for _, position in self.held]
        # Layers x (keys and values) x heads x width x bytes of a float64.
        assert self.slots.bytes_held == len(self.held) * self.layers * 2 * 2 * 4 * 8


class SlotsAndListWithEviction(SlotsAndList):
    """Slots with eviction from the middle, compared at one layer.

    In deeper layers the kept tokens' keys and values were computed while they still saw the evicted tokens. No fresh
    forward reproduces that, nor should it.
    """

    layers = 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Evict any slots. The others keep their positions."""
        stay = sorted(data.draw(st.sets(st.integers(0, len(self.held) - 1))))
        self.slots.keep(stay)
        self.held = [self.held[slot] for slot in stay]


some = settings(max_examples=25, stateful_step_count=12)
TestSlots = SlotsAndList.TestCase
TestSlots.settings = some
TestSlotsWithEviction = SlotsAndListWithEviction.TestCase
TestSlotsWithEviction.settings = some


def filled(length: int, capacity: int) -> Slots:
    """Return slots of one layer, one head and width 1, whose keys are 0, 1, 2 … and values their negatives."""
    slots = Slots(capacity, torch.device("cpu"))
    slots.append(torch.arange(length) * 10)
    keys = torch.arange(length, dtype=torch.float64)[None, None, :, None]
    slots.update(keys, -keys, 0)
    return slots


class Counted(TorchDispatchMode):
    """Count operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def contents(slots: Slots) -> tuple[list[float], list[float], list[int]]:
    """Return keys, values and positions through the public interface: an update of no tokens returns a layer's
    content.
    """
    slots.append(torch.zeros(0, dtype=torch.long))
    nothing = torch.zeros(1, 1, 0, 1, dtype=torch.float64)
    keys, values = slots.update(nothing, nothing, 0)
    return keys.flatten().tolist(), values.flatten().tolist(), slots.positions[: slots.length].tolist()


def test_a_gather_moves_keys_values_and_positions_alike() -> None:
    """Guards against keys that move without their values or positions, and a gather that reads slots it has
    overwritten.
    """
    slots = filled(8, 8)
    slots.keep([3, 5, 6], after=2)
    expected = [0.0, 1.0, 3.0, 5.0, 6.0]
    assert contents(slots) == (expected, [-x for x in expected], [0, 10, 30, 50, 60])


@pytest.mark.parametrize("layers", [1, 4])
def test_stacked_layers_move_together(layers: int) -> None:
    """Guards against a GPU that idles while the host launches the same copies for each layer."""
    slots = model(layers).new_slots(8)
    model(layers).forward(slots, torch.tensor([1, 2, 3, 4]))
    slots.storage.stack(slots.length)
    with Counted() as copied:
        slots.keep([0, 2, 3])
    assert copied.operations["index_put_"] + copied.operations["copy_"] == 2  # keys and values; positions


def test_a_layer_writes_the_rows_of_a_batch_together() -> None:
    """Guards against a GPU that idles while the host launches copies for each sequence of a batch, in each layer."""

    def operations(layers: int, size: int) -> int:
        lm = model(layers)
        batch = SlotBatch([lm.new_slots(8) for _ in range(size)])
        for _ in range(2):  # the first forward makes the shared tensors
            with Counted() as counted:
                lm.forward_trees(batch, [[1]] * size, [DraftTree.empty()] * size)
        return counted.operations.total()

    assert operations(4, 2) - operations(1, 2) == operations(4, 6) - operations(1, 6)


def test_keeping_a_prefix_moves_nothing() -> None:
    """Guards against a copy of the whole cache at every step that accepts a chain."""
    slots = filled(8, 8)
    nothing = torch.zeros(1, 1, 0, 1, dtype=torch.float64)
    slots.append(torch.zeros(0, dtype=torch.long))
    keys, values = slots.update(nothing, nothing, 0)
    versions = keys._version, values._version
    slots.keep([2, 3, 4], after=2)
    slots.keep(range(4))
    assert (keys._version, values._version) == versions
    slots.append(torch.zeros(0, dtype=torch.long))
    assert slots.update(nothing, nothing, 0)[0].data_ptr() == keys.data_ptr()
    assert contents(slots)[0] == [0.0, 1.0, 2.0, 3.0]


@torch.inference_mode()
def test_slots_grow_by_doubling_and_lose_nothing() -> None:
    """Guards against an allocation for each token, and against growth that loses the earlier content."""
    slots = filled(3, 3)
    capacities = []
    for position in range(3, 20):
        slots.append(torch.tensor([position * 10]))
        key = torch.full((1, 1, 1, 1), float(position), dtype=torch.float64)
        slots.update(key, -key, 0)
        capacities.append(slots.capacity)
    assert sorted(set(capacities)) == [6, 12, 24]
    expected = [float(i) for i in range(20)]
    assert contents(slots) == (expected, [-x for x in expected], [i * 10 for i in range(20)])


def test_a_long_text_takes_what_it_needs_at_once() -> None:
    """Guards against slots that only double where more than twice the capacity is appended."""
    slots = Slots(2, torch.device("cpu"))
    slots.append(torch.arange(50))
    assert slots.capacity == slots.length == 50


def test_the_cache_tells_a_model_the_length_before_its_forward() -> None:
    """Guards against positions counted twice by models that read the length from their cache."""
    slots = filled(5, 8)
    assert slots.get_seq_length() == 0
    slots.append(torch.tensor([50, 60]))
    assert slots.get_seq_length() == 5


@pytest.mark.parametrize(
    ("indices", "after"),
    [([0, 0], 0), ([1, 0], 0), ([4], 0), ([-1], 0), ([0, 4], 0), ([1], 2), ([], 5), ([2, 3, 3], 2)],
    ids=str,
)
def test_slots_that_cannot_be_kept_are_named(indices: list[int], after: int) -> None:
    """Guards against a gather out of order or from empty slots, and against one that fails halfway through."""
    slots = filled(4, 8)
    with pytest.raises(ValueError, match=rf"must ascend within \[{after}, 4\), got \[") as error:
        slots.keep(indices, after=after)
    assert str(indices) in str(error.value)
    assert contents(slots)[0] == [0.0, 1.0, 2.0, 3.0]
