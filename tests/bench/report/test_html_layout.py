"""The layout of HTML pages at several widths, and the labels of their charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.quality.quality_page import section as quality_section
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.speed_charts import acceptance, styles
from specdecode.bench.report.start_page import Chip, Entry, start_page
from specdecode.bench.report.svg import letters
from specdecode.evals.margins import check_margins
from tests.helpers.browser import CHROMIUM, look_at
from tests.helpers.quality_runs import whole_quality_run
from tests.helpers.run_contents import SPEEDUPS, scored_run
from tests.helpers.speed_runs import ARMS, whole_sweep

PAGES = ("speed", "quality", "start")


def page(name: str) -> str:
    """Return one of the pages: with many arms, all columns, and a long name."""
    if name == "quality":
        return document("t", quality_section(whole_quality_run(), check_margins(whole_quality_run(), {}), None))
    if name == "start":
        long = "a-very-long-name-" * 6
        row = Entry("2026-01-01", long, f"float32 on {long}", "quick", [Chip("bad", "1 REGRESSED")] * 5, f"{long} 2.0")
        return start_page([(row, "a.html")] * 3)
    run = scored_run(SPEEDUPS | {"a-very-long-name-" * 6: 1.1, "linear-cost-aware": 1.9})
    return document("t", section(run, "t with d", "by", [], History([], "none")))


@pytest.mark.parametrize(("gate", "said"), [("on", "None fails"), ("strict", "1 of 1 fail")])
def test_the_page_fails_what_the_gate_fails(gate: str, said: str) -> None:
    """Guards against a page that is green where `gate = "strict"` fails the run."""
    unclear = [Judgement("lookup", "time", Verdict.INCONCLUSIVE, "too wide")]
    assert said in document("t", section(scored_run(SPEEDUPS), "t", "by", unclear, gate=gate))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("scheme", "width"), [("dark", 360), ("light", 768), ("light", 1216), ("dark", 1440)])
def test_no_table_scrolls_sideways(tmp_path: Path, name: str, scheme: str, width: int) -> None:
    """Guards against figures beyond the edge of the screen, and tables that never are tables."""
    seen = look_at(page(name), scheme, width, tmp_path)
    assert seen["scroll"] <= width
    assert (seen["cut"], seen["small"]) == (0, 0)
    assert seen["chip"] < 24  # one line
    assert (seen["blocks"] > 0) == (width < 1216)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "tile_lines"), [(360, 2), (768, 1), (1440, 1)])
def test_charts_stand_below_their_ruler(tmp_path: Path, width: int, tile_lines: int) -> None:
    """Guards against a ruler beside the charts that it measures, and a tile that stands alone in its line."""
    run = whole_sweep()
    seen = look_at(document("t", section(run, "t with d", "by", [])), "light", width, tmp_path)
    (place,) = seen["places"]
    assert (float(place.split()[1]) > 250) == (width == 360)
    assert seen["below"] == (len(ARMS) if width == 360 else 0)
    assert seen["lines"] == tile_lines


@pytest.mark.parametrize("longest", [3, 9, 10, 16, 99, 100])
def test_tick_labels_have_space_between_them(longest: int) -> None:
    """Guards against labels of two digits that run into each other: 10121416."""
    run = whole_sweep()
    chart = acceptance(run, "linear-k4", longest, styles(run)["linear-k4"])
    labels = [text for text in chart.iter("text") if str(text.text).isdigit()]
    assert len(labels) > 6
    ends: dict[Any, float] = {}
    for label in labels:
        panel = float(label.attrib["x"]) > 170
        half = letters(len(str(label.text))) / 2
        assert float(label.attrib["x"]) - half > ends.get(panel, 0.0) + 3
        ends[panel] = float(label.attrib["x"]) + half
    assert len({str(label.text) for label in labels}) > min(longest, 6)
