"""The fixture `paired`: a test compares two functions of any project, and gates their speed with `--benchmark`."""

from __future__ import annotations

import copy
import math
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specdecode.bench.gate.verdicts import AGAINST_TOLERANCE, FAILING, Judgement, tolerance_of
from specdecode.bench.measure.paired import LEAST_BLOCKS, SECONDS, Paired, TimedFunction, measure_paired, timer
from specdecode.bench.measure.paired_version import CHANNEL, OtherVersion, OtherVersionError, answer
from specdecode.bench.measure.replay import clock, replay
from specdecode.bench.options import Options
from specdecode.bench.report.comment import cut_table
from specdecode.bench.report.grid import rich_table
from specdecode.bench.report.junit import record_properties, verdict_properties
from specdecode.bench.report.tables import verdicts
from specdecode.bench.report.terminal import console_text
from specdecode.support.checked import shown
from specdecode.support.progress import progress
from specdecode.support.worktree import worktree

_LONG_S = 20.0
"""Seconds from which a measurement shows its progress."""

_JUDGEMENTS: pytest.StashKey[list[Judgement]] = pytest.StashKey()
_OTHER: pytest.StashKey[Path] = pytest.StashKey()


def judged_pairs(config: pytest.Config) -> list[Judgement]:
    """Return the judgements of this session, in order."""
    return config.stash.setdefault(_JUDGEMENTS, [])


class Pair:
    """A comparison of a new function with an old one. Each test can call it once.

    Args:
        request: request of the test.
        options: options of the session that times and judges the functions. With None only their values are compared.
    """

    def __init__(self, request: pytest.FixtureRequest, options: Options | None) -> None:
        self._request, self._options, self._called = request, options, False

    def __call__(
        self,
        new: Callable[[], Any],
        old: Callable[[], Any] | None = None,
        *,
        equal: Callable[[Any, Any], Any] = operator.eq,
        counters: Callable[[Any], Mapping[str, float]] = lambda value: {},
        seconds: float = SECONDS,
    ) -> Paired | None:
        """Check that both functions return equal values. With `--benchmark`, time them in turns and judge.

        With `--benchmark --against REF` the old function is the `new` of this test in commit REF.

        Args:
            new: the function whose speed is judged.
            old: the function that it is compared with.
            equal: called with both values; returns whether they are equal.
            counters: called with a function's value; returns counts by name that do not depend on the clock. Lower is
                better.
            seconds: time for measuring both functions.

        Returns:
            The measurements; None if nothing was timed.
        """
        __tracebackhide__ = True  # a traceback of the test's functions need not show this frame
        if self._called:
            pytest.fail("paired was already called in this test: split the test in two", pytrace=False)
        self._called = True
        started = time.perf_counter()
        ours = _called("the new function", new, counters)
        if CHANNEL in os.environ:
            answer(ours)
            return None
        # The least number of blocks, which an interval needs, may take longer than the given seconds.
        total_s = max(seconds, 4 * LEAST_BLOCKS * (time.perf_counter() - started))
        options = self._options
        if options is not None and options.against is not None:
            with _in_a_sentence(), closing(self._other_version(options.root, options.against)) as other:
                _check(ours, other.side, equal)
                paired = self._measure(ours, other.side, seconds, total_s, options.again)
        elif old is not None:
            theirs = _called("the old function", old, counters)
            _check(ours, theirs, equal)
            if options is None:
                return None
            paired = self._measure(ours, theirs, seconds, total_s, options.again)
        elif options is not None:
            pytest.fail("paired has no old function: give it one, or run with --against REF", pytrace=False)
        else:
            return None
        self._judge(paired, options)
        return paired

    @property
    def _name(self) -> str:
        return str(self._request.node.name)

    def _other_version(self, root: Path, ref: str) -> OtherVersion:
        """Start this test in another commit. The commit's files stay until the session ends."""
        config = self._request.config
        if _OTHER not in config.stash:
            files = ExitStack()
            try:
                config.stash[_OTHER] = files.enter_context(worktree(root, ref))
            except ValueError as error:
                pytest.exit(f"--against {error}", returncode=2)
            config.add_cleanup(files.close)
        in_one_process = ["-n0"] if config.pluginmanager.hasplugin("xdist") else []
        return OtherVersion(ref, config.stash[_OTHER], root, self._request.node.nodeid, in_one_process)

    def _measure(self, new: TimedFunction, old: TimedFunction, seconds: float, total_s: float, again: float) -> Paired:
        """Time both functions, and show the progress of a long measurement."""
        if total_s < _LONG_S:
            return measure_paired(self._name, new, old, seconds, again=again)
        with ExitStack() as stack:
            if capture := self._request.config.pluginmanager.getplugin("capturemanager"):
                stack.enter_context(capture.global_and_fixture_disabled())
            show = stack.enter_context(progress("seconds"))
            return measure_paired(self._name, new, old, seconds, progress=show, again=again)

    def _judge(self, paired: Paired, options: Options) -> None:
        """Add the measurements to pytest-benchmark's table and file, and fail the test on a failing verdict."""
        tolerance = options.tolerances.get(self._name, tolerance_of(options.tolerance, AGAINST_TOLERANCE))
        judgements = paired.judge(tolerance)
        judged_pairs(self._request.config).extend(judgements)
        self._replay(paired, judgements)
        for judged in judgements:
            properties = verdict_properties(judged)
            record_properties(self._request, {f"{judged.gate}_{name}": value for name, value in properties.items()})
        if failing := [judged for judged in judgements if judged.verdict in FAILING[options.gate]]:
            lines = [f"{judged.verdict.value}: {judged.arm} {judged.gate}: {judged.reason}" for judged in failing]
            pytest.fail("\n".join(lines), pytrace=False)

    def _replay(self, paired: Paired, judgements: Sequence[Judgement]) -> None:
        """Add two rows to pytest-benchmark's table, in their own group. The new function's row has all measures."""
        self._request.node.add_marker(pytest.mark.benchmark(timer=clock, group=self._name))
        benchmark = self._request.getfixturevalue("benchmark")
        old = copy.copy(benchmark)  # a test has only one fixture, and two rows need two
        old.extra_info = {}
        benchmark.extra_info.update(_measures(paired), **{f"{j.gate}_verdict": j.verdict.value for j in judgements})
        for row, side, times in ((benchmark, "new", paired.new_s), (old, "old", paired.old_s)):
            row.name, row.fullname = f"{row.name} ({side})", f"{row.fullname} ({side})"
            replay(row, times)


def _called(name: str, function: Callable[[], Any], counters: Callable[[Any], Mapping[str, float]]) -> TimedFunction:
    """Call a function once, and return its side of the comparison: value, counters and timer."""
    __tracebackhide__ = True
    value = function()
    counted = counters(value)
    if not isinstance(counted, Mapping):
        pytest.fail(f"counters returns {shown(counted)}: it must return numbers by name", pytrace=False)
    for counter, number in counted.items():
        try:
            usable = math.isfinite(number)
        except (TypeError, ValueError):
            usable = False
        if not usable:
            pytest.fail(f"counter {counter!r} is {shown(number)}, which is not a finite number", pytrace=False)
    return TimedFunction(
        name, value, timer(function), {str(counter): float(number) for counter, number in counted.items()}
    )


def _check(new: TimedFunction, old: TimedFunction, equal: Callable[[Any, Any], Any]) -> None:
    """Fail the test if the functions' values are not equal."""
    __tracebackhide__ = True
    if not bool(equal(new.value, old.value)):
        values = f"{new.name} returns {shown(new.value)} and {old.name} {shown(old.value)}"
        pytest.fail(f"{values}: nothing was timed", pytrace=False)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Fail the test with one sentence if the other commit cannot run it."""
    reason = ""
    try:
        yield
    except OtherVersionError as error:
        reason = str(error)
    if reason:  # outside the handler, as pytest would also show the handled exception
        pytest.fail(reason, pytrace=False)


def _measures(paired: Paired) -> dict[str, float]:
    """Return the measures of a comparison for pytest-benchmark's file: seconds a call, ratios, the floor in logarithms.

    Counters follow by name.
    """
    change = paired.change
    return {
        "new_s": statistics.median(paired.new_s),
        "old_s": statistics.median(paired.old_s),
        "speed": change.value,
        "speed_low": change.low,
        "speed_high": change.high,
        "floor": paired.floor,
        "blocks": float(len(paired.blocks)),
        "repeated": float(paired.repeated),
        "disturbed": float(paired.disturbed),
        "new_loops": float(paired.loops[0]),
        "old_loops": float(paired.loops[1]),
        **{f"new_{name}": value for name, value in paired.new.counters.items()},
        **{f"old_{name}": value for name, value in paired.old.counters.items()},
    }


def pairs_text(judgements: Sequence[Judgement], colours: bool, encoding: str) -> str:
    """Return the verdicts of a session as text for a terminal with an encoding."""

    def show(console: Console) -> None:
        console.print(rich_table(verdicts(judgements, "test")))
        console.print("Times are medians of a call, and intervals are 95 %.", highlight=False)

    return console_text(show, colours, encoding)


def pairs_comment(judgements: Sequence[Judgement]) -> str:
    """Return the verdicts of a session in Markdown, failing ones first. A very long table is cut."""
    return f"## Paired functions\n\n{cut_table(verdicts(judgements, 'test'), 'verdicts')}\n"
