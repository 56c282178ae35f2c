from __future__ import annotations

import pytest

from specdecode.bench.runs.counts import (
    Histograms,
    RowCounts,
    RowSeconds,
    as_dict,
    from_dict,
    ratio,
    total,
    total_histograms,
)
from specdecode.bench.runs.records import ArmRecord, Row


def test_sums_are_taken_field_by_field() -> None:
    """Guards against a sum over some rows that looks like one over all."""
    rows = [RowCounts(runs=1, tokens=8, steps=4, drafted=6, nll=1.5), RowCounts(runs=2, tokens=16, steps=9, drafted=0)]
    assert total(RowCounts, rows) == RowCounts(runs=3, tokens=24, steps=13, drafted=6)
    nothing = total(RowSeconds, [])
    assert (nothing.total, nothing.draft) == (0.0, 0.0)
    assert ratio(nothing.draft, nothing.total) is None
    steps = [Histograms(accepted=[1, 2], depth=[0, 3]), Histograms(accepted=[4], depth=[0, 1, 3])]
    assert total_histograms(steps) == Histograms(accepted=[5, 2], depth=[0, 4, 3])


def test_plain_values_come_back() -> None:
    """Guards against a counted zero that is written as not counted, and a read error for a name from a later
    version.
    """
    counts = RowCounts(runs=1, tokens=8, steps=8, drafted=0)
    assert as_dict(counts) == {"runs": 1, "tokens": 8, "steps": 8, "drafted": 0}
    assert from_dict(RowCounts, as_dict(counts) | {"of_a_later_version": 3}) == counts
    assert as_dict(Histograms()) == {}


def test_a_mistyped_name_is_an_error() -> None:
    """Guards against a mistyped count name that silently reads as missing."""
    record = ArmRecord({"p": Row(0.0, RowCounts(runs=1, tokens=8, steps=8), RowSeconds(total=1.0, ttft=0.1))})
    assert record.seconds().later_verify is None
    with pytest.raises(AttributeError, match="later_verfy"):
        record.seconds().later_verfy  # noqa: B018
    with pytest.raises(TypeError, match="acepted"):
        RowCounts(runs=1, tokens=8, steps=8, acepted=3)
