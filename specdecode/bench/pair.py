"""The fixture `paired`: two functions of any project compared in a test, and gated with `--benchmark`."""

from __future__ import annotations

import operator
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specdecode.bench.command_line import options_of
from specdecode.bench.gate.verdicts import AGAINST_TOLERANCE, FAILING, Judgement, tolerance_of
from specdecode.bench.measure.paired import SECONDS, Paired, measure_paired, timer
from specdecode.bench.measure.paired_version import CHANNEL, OtherVersion, OtherVersionError, answer
from specdecode.bench.measure.replay import clock, replay
from specdecode.bench.options import Options
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.markdown import markdown_table
from specdecode.bench.report.terminal import rendered
from specdecode.support.checked import shown
from specdecode.support.worktree import worktree

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """What was measured in a test, and the verdicts."""

    paired: Paired
    judgements: Sequence[Judgement]


_PAIRS: pytest.StashKey[list[JudgedPair]] = pytest.StashKey()
_OTHER: pytest.StashKey[Path] = pytest.StashKey()


def pairs_of(config: pytest.Config) -> list[JudgedPair]:
    """Return what was measured in this session, in order."""
    return config.stash.setdefault(_PAIRS, [])


class Pair:
    """Compare a new function with an old one, once a test.

    Args:
        request: of the test.
        timed: time them and judge; otherwise their values alone are compared.
    """

    def __init__(self, request: pytest.FixtureRequest, timed: bool) -> None:
        self._request, self._timed, self._called = request, timed, False

    def __call__(
        self,
        new: Callable[[], Any],
        old: Callable[[], Any] | None = None,
        *,
        equal: Callable[[Any, Any], Any] = operator.eq,
        counters: Callable[[Any], Values] = lambda value: {},
        seconds: float = SECONDS,
    ) -> Paired | None:
        """Check that both functions return the same. With `--benchmark`, time them in turns and judge.

        With `--against REF` the new function is this test's in that commit: `old` is not asked.

        Args:
            new: the function whose speed is judged.
            old: the function that it is compared with.
            equal: takes both values, and returns whether they are the same.
            counters: takes a value, and returns by name what does not depend on the clock; less is better.
            seconds: to time both for.

        Returns:
            What was measured; None if nothing was.
        """
        if self._called:
            pytest.fail("paired was called before in this test: make it two tests", pytrace=False)
        self._called = True
        value = new()
        if CHANNEL in os.environ:
            answer(value, dict(counters(value)), timer(new))
            return None
        options = options_of(self._request.config)
        if self._timed and options.against is not None:
            with _told(), closing(self._other_version(options.root, options.against)) as other:
                self._check(equal(value, other.value), value, other.value, options.against)
                times = measure_paired(
                    self._name,
                    timer(new),
                    other.time,
                    seconds,
                    new_counters=counters(value),
                    old_counters=other.counters,
                )
            return self._judge(times, options)
        if old is None:
            if self._timed:
                pytest.fail("paired has no old function: give it one, or run with --against REF", pytrace=False)
            return None
        old_value = old()
        self._check(equal(value, old_value), value, old_value, "the old function")
        if not self._timed:
            return None
        times = measure_paired(
            self._name,
            timer(new),
            timer(old),
            seconds,
            new_counters=counters(value),
            old_counters=counters(old_value),
        )
        return self._judge(times, options)

    @property
    def _name(self) -> str:
        return str(self._request.node.name)

    def _other_version(self, root: Path, ref: str) -> OtherVersion:
        """Start this test in another commit. Its files stay until the session ends."""
        config = self._request.config
        if _OTHER not in config.stash:
            files = ExitStack()
            try:
                config.stash[_OTHER] = files.enter_context(worktree(root, ref))
            except ValueError as error:
                pytest.exit(str(error), returncode=2)
            config.add_cleanup(files.close)
        return OtherVersion(ref, config.stash[_OTHER], root, self._request.node.nodeid)

    def _check(self, same: Any, value: Any, other: Any, whose: str) -> None:
        if not bool(same):
            pytest.fail(
                f"the new function returns {shown(value)} and {whose} {shown(other)}: nothing was timed", pytrace=False
            )

    def _judge(self, paired: Paired, options: Options) -> Paired:
        """Show what was measured in pytest-benchmark's table and file, and fail on a failing verdict."""
        from specdecode.bench.report.junit import record_properties, verdict_properties

        tolerance = options.tolerances.get(self._name, tolerance_of(options.tolerance, AGAINST_TOLERANCE))
        judgements = paired.judge(tolerance)
        pairs_of(self._request.config).append(JudgedPair(paired, judgements))
        self._request.node.add_marker(pytest.mark.benchmark(timer=clock, group="paired"))
        benchmark = self._request.getfixturevalue("benchmark")
        benchmark.extra_info.update(_measures(paired), **{f"{j.gate}_verdict": j.verdict.value for j in judgements})
        replay(benchmark, paired.new_s)
        for judged in judgements:
            record_properties(
                self._request,
                {f"{judged.gate}_{name}": of_it for name, of_it in verdict_properties(judged).items()},
            )
        if failing := [judged for judged in judgements if judged.verdict in FAILING[options.gate]]:
            lines = [f"{judged.verdict.value}: {judged.arm} {judged.gate}: {judged.reason}" for judged in failing]
            pytest.fail("\n".join(lines), pytrace=False)
        return paired


@contextmanager
def _told() -> Iterator[None]:
    """Fail the test with one sentence where the other commit cannot run it."""
    reason = ""
    try:
        yield
    except OtherVersionError as error:
        reason = str(error)
    if reason:
        pytest.fail(reason, pytrace=False)


def _measures(paired: Paired) -> dict[str, float]:
    """Return what pytest-benchmark's file keeps of a comparison: seconds a call, ratios, logarithms for the floor."""
    change = paired.change
    return {
        "new_s": statistics.median(paired.new_s),
        "old_s": statistics.median(paired.old_s),
        "speed": change.value,
        "speed_low": change.low,
        "speed_high": change.high,
        "floor": paired.floor,
        "blocks": float(len(paired.blocks)),
        "loops": float(paired.loops),
        **{f"new_{name}": float(value) for name, value in paired.new_counters.items()},
        **{f"old_{name}": float(value) for name, value in paired.old_counters.items()},
    }


def _table(pairs: Sequence[JudgedPair]) -> Grid:
    columns = [Column("verdict", figures=False), Column("test", figures=False), Column("of", figures=False)]
    columns += [Column("new"), Column("old"), Column("speed over old"), Column("why", False, True)]
    rows = []
    for pair in pairs:
        paired = pair.paired
        times = [_duration(statistics.median(seconds)) for seconds in (paired.new_s, paired.old_s)]
        for judged in pair.judgements:
            measured = [*times, f"{paired.change:.3f}"] if judged.gate == "time" else ["", "", ""]
            rows.append([judged.verdict.value, judged.arm, judged.gate, *measured, judged.reason])
    return Grid(columns, rows)


def _duration(seconds: float) -> str:
    """Write seconds in a unit in which they are easily read."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def pairs_text(pairs: Sequence[JudgedPair], colours: bool, encoding: str) -> str:
    """Return the verdicts of a session as text for a terminal of an encoding."""

    def show(console: Console) -> None:
        console.print(rich_table(_table(pairs)))
        console.print("New and old: the median time of a call. Intervals are 95 %.", highlight=False)

    return rendered(show, colours, encoding)


def pairs_comment(pairs: Sequence[JudgedPair]) -> str:
    """Return the verdicts of a session in Markdown."""
    return f"## Paired functions\n\n{markdown_table(_table(pairs))}\n"
