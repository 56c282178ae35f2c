"""Runs with pauses: times must not contain the pauses."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from specdecode import generate
from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.callables import ArmStep
from specdecode.bench.arms.slices import Slices, sliced
from tests.helpers.fake_clock import Cost, FakeClock, charged
from tests.helpers.models import lm, prompt

LENGTH, STEPS = 8, 3
PAUSE_S = 100.0
ARMS: dict[str, dict[str, Any]] = {
    "ar": {},
    "hf": {"peer": "generate"},
    "batch": {"drafter": "lookup", "batch": 2},
    "code": {"call": "sliced_code:make"},
    "timed code": {"call": "sliced_code:make", "options": {"own_times": True}},
    "callback": {"call": "sliced_code:make", "options": {"own_times": True, "at_the_end": True}},
}


def _code(own_times: bool = False, at_the_end: bool = False) -> Any:
    """Return a decoder that yields each token as it comes, or all at the end, with times of its own or without."""

    def decode(prompt: list[int], count: int) -> Iterator[ArmStep | list[int]]:
        started, steps = time.perf_counter(), []
        tokens = generate(lm("llama"), prompt, max_new_tokens=count).tokens
        for token in tokens:
            time.perf_counter.advance(0.5)  # type: ignore[attr-defined]
            steps.append(ArmStep([token], at_s=time.perf_counter() - started if own_times else None))
            if not at_the_end:
                yield steps[-1]
        if at_the_end:
            yield from steps

    return decode


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    """Let only forwards, pauses and the code of `_code` move the clock."""
    module = ModuleType("sliced_code")
    module.make = lambda *names, **options: _code(**options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sliced_code", module)
    fake = FakeClock(noise=0.0)
    monkeypatch.setattr(time, "perf_counter", fake)
    with charged(fake, {lm("llama").model: Cost(1.0, 0.25)}):
        yield fake


def arm(name: str) -> Arm:
    return make_arm(name, ARMS[name], lm("llama"), None, lengths=(4,))


@pytest.mark.parametrize("name", ARMS)
def test_times_contain_no_pause(name: str, clock: FakeClock) -> None:
    """Guards against a pause that counts as time of the run, of its first token or of a shorter length."""
    made = arm(name)
    whole = made.run(prompt(), LENGTH, ())
    pauses = []

    def wait() -> None:
        pauses.append(clock())
        clock.advance(PAUSE_S)

    with sliced(STEPS, wait) as slices:
        paused = made.run(prompt(), LENGTH, ())
    assert paused.tokens == whole.tokens
    # After the first step, and after each three more. The last slice ends with the run. A batch does not pause.
    prompts = 2 if name == "batch" else 1
    assert len(pauses) == (3 if prompts == 1 else 0)
    assert len(slices.seconds) == len(pauses) + 1
    assert sum(slices.seconds) == pytest.approx(paused.total_s * prompts)
    for kind in ("total_s", "ttft_s"):
        assert getattr(paused, kind) == pytest.approx(getattr(whole, kind)), kind
    assert [cut.total_s for cut in paused.cuts] == pytest.approx([cut.total_s for cut in whole.cuts])
    if name in ("ar", "hf"):
        first, second, third, last = slices.seconds
        assert first > second == pytest.approx(third) == pytest.approx(STEPS * 1.25)
        assert last == pytest.approx((LENGTH - 1 - 2 * STEPS) * 1.25)


def test_a_run_begins_its_slices_anew(clock: FakeClock) -> None:
    """Guards against slices of an earlier try, as when graphs were captured, among those of a run."""
    made = arm("ar")
    with sliced(STEPS, lambda: None) as slices:
        made.run(prompt(), 4, ())
        run = made.run(prompt(), LENGTH, ())
    assert sum(slices.seconds) == pytest.approx(run.total_s)
    assert Slices.current is None


def test_a_pause_does_not_use_up_the_time_limit() -> None:
    """Guards against an arm from code that fails because the other version was slow."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with sliced(1, lambda: time.sleep(0.3)) as slices:
            slices.end_step(1)
        assert not rang
        time.sleep(0.3)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
