"""Runs of arms that take turns with plain decoding."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from specdecode import LM, PromptLookup, generate
from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.run import Run
from specdecode.bench.arms.slices import end_step, timed_call
from specdecode.bench.measure import turns as measured_turns
from specdecode.bench.measure.experiment import experiment
from specdecode.bench.measure.steady import Steady
from specdecode.bench.measure.turns import Turns, reason_against
from specdecode.bench.runs.counts import Counts
from specdecode.core.slots import Slots
from tests.helpers.fake_clock import Cost, FakeClock, charged
from tests.helpers.models import lm, prompt

LENGTH = 24


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(noise=0.0)
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def target() -> LM:
    return lm("llama")


def arm(name: str, target: LM, **entry: Any) -> Arm:
    return make_arm(name, entry, target, None, "eager")


def coded(target: LM, steps: Sequence[int], seconds: Callable[[int], float], clock: FakeClock) -> Arm:
    """Return an arm whose steps have these numbers of tokens, and take the seconds that depend on the step."""

    def run(text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        def decode() -> None:
            for step, tokens in enumerate(steps):
                clock.advance(seconds(step))
                end_step([0] * tokens)

        _, total_s = timed_call(target.device, decode)
        return Run([0] * sum(steps), total_s, 0.0, Counts(steps=len(steps)))

    return Arm("coded", run, target)


def undisturbed(*shares: float) -> Steady:
    given = iter(shares)
    return Steady(watch=lambda: lambda: next(given, 0.0))


def plain_costs(clock: FakeClock, turns: Turns, seconds: float) -> Any:
    """Let each forward of plain decoding take these seconds."""
    return charged(clock, {turns._target.model: Cost(seconds, 0.0)})


def test_plain_decoding_has_the_arms_number_of_tokens_after_each_turn(
    target: LM, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against whole runs one after the other, and against turns at different places of the text."""
    log: list[int] = []
    plain_steps = measured_turns.plain_steps
    monkeypatch.setattr(
        measured_turns,
        "plain_steps",
        lambda *args, **others: (log.append(n) or n for n in plain_steps(*args, **others)),
    )
    turns = Turns(arm("ar", target), undisturbed())
    places: list[tuple[int, int]] = []
    steps = [1, 3, 1, 4, 2]
    drafted = coded(target, steps, lambda step: places.append((step, len(log))) or 1.0, clock)
    with plain_costs(clock, turns, 0.5):
        turn = turns.measure(drafted, prompt(), sum(steps), ())
    assert places == [(0, 0), (1, 1), (2, 4), (3, 5), (4, 9)]
    assert log == list(range(1, 12))
    assert turn.run.total_s == pytest.approx(5.0)
    assert turn.plain_s == pytest.approx(11 * 0.5)
    assert math.log(turn.run.beside_s / turn.run.s_per_token) == pytest.approx(math.log(5.5 / 5.0))


def test_plain_decoding_goes_on_where_it_would_stop(target: LM, clock: FakeClock) -> None:
    """Guards against a speedup of a third for an arm of equal speed whose output ends later than plain decoding's."""
    stop = generate(target, prompt(), max_new_tokens=3).tokens[-1]
    stopping = replace(arm("ar", target), stop_token_ids=(stop,))
    turns = Turns(stopping, undisturbed())
    longer = coded(target, [1] * 9, lambda step: 1.0, clock)
    with plain_costs(clock, turns, 1.0):
        turn = turns.measure(longer, prompt(), 9, ())
    assert turn.run.beside_s / turn.run.s_per_token == pytest.approx(1.0)


def test_a_run_gives_its_slots_back(target: LM, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against CUDA graphs that each run captures anew, because the slots of the last are still in use."""
    turns = Turns(arm("ar", target), undisturbed())
    made: list[weakref.ref[Slots]] = []
    new_slots = turns._target.new_slots
    monkeypatch.setattr(turns._target, "new_slots", lambda capacity: noted(new_slots(capacity), made))
    with plain_costs(clock, turns, 1.0), without_collections():
        turns.measure(coded(target, [1] * 4, lambda step: 1.0, clock), prompt(), 4, ())
        assert [slots() for slots in made] == [None]


def noted(slots: Slots, made: list[weakref.ref[Slots]]) -> Slots:
    made.append(weakref.ref(slots))
    return slots


@contextmanager
def without_collections() -> Iterator[None]:
    """Within this context, no garbage is collected."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_machine_that_gets_slower_slows_both(target: LM, clock: FakeClock) -> None:
    """Guards against a speedup that depends on which of two runs came first."""
    clock.drift = 0.01
    turns = Turns(arm("ar", target), undisturbed())
    steps = [1] * LENGTH
    with plain_costs(clock, turns, 1.0):
        turn = turns.measure(coded(target, steps, lambda step: 2.0, clock), prompt(), LENGTH, ())
    assert clock.drift * clock() > 1, "or nothing gets slower"
    # Plain decoding is behind by a slice, here of two seconds in which the machine gets 2 % slower.
    assert turn.run.beside_s / turn.run.s_per_token == pytest.approx(0.5, rel=0.025)


def test_a_disturbed_slice_counts_for_neither_side(target: LM, clock: FakeClock) -> None:
    """Guards against a burst of other work in one slice that decides a speedup."""
    turns = Turns(arm("ar", target), undisturbed(0.0, 0.0, 0.4))
    slow = coded(target, [1] * 8, lambda step: 9.0 if step == 2 else 1.0, clock)
    with plain_costs(clock, turns, 1.0):
        turn = turns.measure(slow, prompt(), 8, ())
    assert turn.run.beside_s / turn.run.s_per_token == pytest.approx(1.0)
    assert (turn.run.tries, turn.run.disturbed) == (1, False)
    assert (turn.run.slices, turn.run.left_out) == (9, 1)  # the last one is what follows the last step


def test_code_that_yields_everything_at_the_end_is_compared_as_a_whole(target: LM, clock: FakeClock) -> None:
    """Guards against a speedup from the slices after the work was done."""
    turns = Turns(arm("ar", target), undisturbed(0.4))
    late = coded(target, [1] * 8, lambda step: 8.0 if step == 0 else 0.0, clock)
    with plain_costs(clock, turns, 1.0):
        turn = turns.measure(late, prompt(), 8, ())
    assert turn.run.beside_s / turn.run.s_per_token == pytest.approx(1.0)


def test_an_arm_may_record_on_its_target_meanwhile(target: LM) -> None:
    """Guards against plain decoding that records hidden states or attention for an arm, and against another output."""
    heavy = arm("heavy", target, drafter="lookup", policy="heavy-hitter", cache=16)
    turns = Turns(arm("ar", target), undisturbed())
    with target.recording_attention():
        assert target.model.config._attn_implementation == "eager"
        assert turns._target.model.config._attn_implementation == "sdpa"
    assert turns._target.weight_bytes == target.weight_bytes
    expected = generate(target, prompt(), policy=heavy.policy, drafter=PromptLookup(), max_new_tokens=LENGTH).tokens
    turn = turns.measure(heavy, prompt(), LENGTH, ())
    assert turn.run.tokens == expected
    assert turn.run.beside_s is not None


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"ar": {}, "lookup": {"drafter": "lookup"}, "hf": {"peer": "generate"}}, None),
        ({"ar": {}, "many": {"batch": 2}}, "many decodes a batch"),
        ({"ar": {}, "a": {"drafter": "lookup"}, "b": {"drafter": "lookup", "baseline": "a"}}, "b has a reference arm"),
        ({"ar": {"drafter": "lookup"}}, "ar is not this package's plain decoding"),
        ({"ar": {"peer": "generate"}}, "ar is not this package's plain decoding"),
    ],
)
def test_what_cannot_take_turns_says_why(entries: dict[str, Any], reason: str | None, target: LM) -> None:
    """Guards against a run that is compared with the wrong arm, or never ends its turn."""
    given = reason_against([arm(name, target, **entry) for name, entry in entries.items()], "ar")
    assert given is None if reason is None else given is not None and given.startswith(reason)


def test_an_experiment_in_turns_has_a_speedup_and_a_floor_for_each_block(target: LM) -> None:
    """Guards against speedups over whole runs of the reference arm, against a floor of none, and against wrong outputs
    that are not seen.
    """
    arms = [arm("ar", target), arm("lookup", target, drafter="lookup"), arm("hf", target, peer="generate")]
    told: list[tuple[int, int]] = []
    results = experiment(
        arms,
        {"a": list(prompt()), "b": list(prompt(20))},
        LENGTH,
        2,
        in_turns=True,
        progress=lambda *now: told.append(now[:2]),
    )
    assert told[-1][0] == told[-1][1] == 1 + 3 + 4 * (1 + 3)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for block in results.blocks:
        assert set(block.runs) == {"ar", "lookup", "hf"}
        assert set(block.checks.values()) == {"equal"}
        assert block.log_speedup("ar", "ar") == 0.0
        for name in ("lookup", "hf"):
            run = block.runs[name]
            assert block.log_speedup(name, "ar") == pytest.approx(math.log(run.beside_s / run.s_per_token))
        first = block.runs["ar"]
        assert block.noise("ar") == pytest.approx(math.log(first.beside_s / first.s_per_token))
        assert block.last["ar"].tokens == first.tokens
    assert results.floor > 0
