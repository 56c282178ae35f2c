import sys
from collections.abc import Callable

import pytest
import torch

from perf.call_stack import DEPTHS, below, page_faults
from specdecode import generate
from specdecode.bench.arms.slices import timed_call
from specdecode.bench.measure.paired import timer
from specdecode.support.call_stack import with_stack_room
from tests.helpers.models import lm

CALLS = 1000


def leaf(first: int, second: int, third: int, fourth: int) -> int:
    return first


def work() -> None:
    for _ in range(CALLS):
        leaf(1, 2, 3, 4)


def most_faults(call: Callable[[], object]) -> int:
    """Return the most page faults of a call below any depth, after a first call, which needs pages for its results."""
    call()
    return max(below(depth, lambda: page_faults(call)) for depth in DEPTHS)


_KEEP_A_CHUNK = {13: 13, 14: 4}
"""The first release of each minor version of Python whose stack keeps one chunk; all of later versions do."""

in_chunks = pytest.mark.skipif(
    sys.platform != "linux"
    or not (3, 11) <= sys.version_info < (3, 15)
    or sys.version_info.micro >= _KEEP_A_CHUNK.get(sys.version_info.minor, sys.maxsize),
    reason="this Python gives no chunk of its stack back between two calls",
)


@in_chunks
def test_calls_without_room_ask_for_stack_at_some_depth() -> None:
    """Guards against a measure of page faults that sees none, by which every call would pass."""
    assert most_faults(work) >= CALLS


@in_chunks
@pytest.mark.parametrize(
    "call",
    [with_stack_room(work), lambda: timed_call(torch.device("cpu"), work), lambda: timer(work)(1)],
    ids=["with_stack_room", "timed_call", "timer"],
)
def test_calls_with_room_do_not_ask_for_stack_at_any_depth(call: Callable[[], object]) -> None:
    assert most_faults(call) < CALLS / 10


def test_room_changes_neither_arguments_nor_results_nor_errors() -> None:
    @with_stack_room
    def divided(one: int, *, by: int) -> float:
        """Return a quotient."""
        return one / by

    assert divided(6, by=3) == 2.0
    assert divided.__doc__ == "Return a quotient."
    with pytest.raises(ZeroDivisionError):
        divided(6, by=0)


@in_chunks
def test_generate_is_as_fast_below_a_deep_caller() -> None:
    target = lm("llama")

    def decode(way: Callable[..., object]) -> Callable[[], object]:
        return lambda: way(target, [1, 2, 3], max_new_tokens=2)

    assert most_faults(decode(generate)) < most_faults(decode(generate.__wrapped__)) / 4  # type: ignore[attr-defined]
