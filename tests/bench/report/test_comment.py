"""The content and the size of a comment on a merge request."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.verdicts import FAILING, judge
from specdecode.bench.quality import quality_tables
from specdecode.bench.report.comment import comment
from specdecode.bench.runs.file import parse
from specdecode.bench.runs.records import RunFile
from specdecode.evals.margins import MarginCheck, Outcome
from tests.helpers.command_line import exit_code
from tests.helpers.pages import MOST_LINES
from tests.helpers.quality_runs import whole_quality_run
from tests.helpers.run_contents import SPEEDUPS, run_content

MANY = SPEEDUPS | {f"linear-k{k}": 2.0 for k in range(2, 120)}


def runs(speedups: dict[str, float], **changes: dict[str, Any]) -> tuple[RunFile, RunFile]:
    """Return a run with some arms' entries changed, and its baseline."""
    old = run_content(speedups)
    new = copy.deepcopy(old)
    for arm, entries in changes.items():
        new["specdecode"]["arms"][arm] |= entries
    return parse(json.dumps(new), Path("new.json")), parse(json.dumps(old), Path("old.json"))


def lines(new: RunFile, old: RunFile, gate: str = "on") -> list[str]:
    return comment(new, "title", "Judged by old.json.", judge(new, old), gate, "new.json").splitlines()


@pytest.mark.parametrize("gate", list(FAILING))
def test_a_comment_has_room_for_any_number_of_arms(gate: str) -> None:
    """Guards against a comment that is too long to read, or that GitHub refuses."""
    faults = {arm: {"bugs": 1} for arm in list(MANY)[5:90]}
    new, old = runs(MANY, **faults)
    elsewhere = parse(json.dumps(run_content(MANY, hardware="zx-81")), Path("x.json"))
    failed = runs(MANY, **{arm: {"failure": "word " * 5000} for arm in faults})
    for run, baseline in ((new, old), (old, old), (old, elsewhere), failed):
        text = lines(run, baseline, gate)
        assert len(text) <= MOST_LINES
        assert len("\n".join(text)) < 65536
        assert any(line == f"and {len(MANY) - 17} more arms." for line in text)


def test_failing_verdicts_come_first_and_in_full() -> None:
    """Guards against a regression that stands below passing arms, or is cut off."""
    new, old = runs(SPEEDUPS, lookup={"failure": "it raised ValueError: no"}, linear={"bugs": 3})
    text = lines(new, old)
    assert text[2].startswith("**4 of 10 verdicts fail**: 4 REGRESSED, 6 PASS.")
    assert "**Wrong outputs, or none:** linear, lookup." in text[2]
    table = [line for line in text if line.startswith("| REGRESSED")]
    assert table == [
        "| REGRESSED | linear | time, counters | 3 wrong output(s): its times and counters are void |",
        "| REGRESSED | lookup | time, counters | it raised ValueError: no |",
    ]
    after = [line for line in text if line.startswith(("| REGRESSED", "PASS in", "| arm"))]
    assert [line.split(" |")[0] for line in after] == [
        *["| REGRESSED"] * 2,
        "PASS in time and counters: 3 arms.",
        "| arm",
    ]
    assert text[-1] == "All tables: `specdecode report new.json --format html`"


@pytest.mark.parametrize("file", ["my  run.json", "a`b``c.json", "$(x) 'y'.json"])
def test_the_command_for_all_tables_reads_any_file(file: str) -> None:
    """Guards against a command that a shell, or Markdown, takes for another one."""
    new, _ = runs(SPEEDUPS)
    (quoted,) = re.findall("All tables: (.*)", comment(new, "title", "by", [], file=file))
    (code,) = re.findall(r"^(?P<fence>`+)(?!`)(.*)(?<!`)(?P=fence)$", quoted)
    assert code[0] not in re.findall("`+", code[1])
    assert shlex.split(code[1]) == ["specdecode", "report", file, "--format", "html"]


def test_a_run_that_passes_says_so_in_a_sentence() -> None:
    """Guards against a table with thirty rows of PASS."""
    new, old = runs(SPEEDUPS)
    text = lines(new, old)
    assert text[2] == "**No verdict fails**: 10 PASS."
    assert "PASS in time and counters: 5 arms." in text
    assert not [line for line in text if line.startswith("| verdict")]
    assert len([line for line in text if line.startswith("| ")]) == 2 + len(SPEEDUPS)


def test_the_gates_setting_decides_what_fails() -> None:
    """Guards against a comment that contradicts the exit code."""
    new, old = runs(SPEEDUPS, linear={"bugs": 3})
    other = parse(json.dumps(run_content(SPEEDUPS, hardware="zx-81")), Path("x.json"))
    assert lines(new, old, "off")[2].startswith("**No verdict fails** (gate: off): 2 REGRESSED, 8 PASS.")
    assert any(line.startswith("| REGRESSED | linear") for line in lines(new, old, "off"))
    assert "WRONG_HARDWARE: ar (time), linear (time), lookup (time)." in " ".join(lines(old, other))
    assert lines(old, other, "strict")[2].startswith("**3 of 10 verdicts fail** (gate: strict)")


def test_wrong_outputs_are_told_without_a_baseline() -> None:
    """Guards against a comment that omits wrong outputs because there is no baseline."""
    new, _ = runs(SPEEDUPS, linear={"bugs": 3})
    text = comment(new, "title", "No baseline.", [])
    assert "**Nothing was judged.** **Wrong outputs, or none:** linear." in text
    assert "specdecode report" not in text


def test_an_arms_own_baseline_is_named() -> None:
    """Guards against a speedup that is read as one over another arm."""
    new, _ = runs(SPEEDUPS, lookup={"baseline": "linear"})
    rows = {line.split("|")[1].strip(): line for line in comment(new, "title", "", []).splitlines() if "|" in line}
    assert "speedup over ar" in rows["arm"]
    assert "0.65 [" in rows["lookup"]
    assert "] over linear |" in rows["lookup"]
    assert "over" not in rows["linear"]


def test_in_a_cut_table_faulty_arms_come_first() -> None:
    """Guards against a shortened table without the one arm that matters."""
    last = list(MANY)[-1]
    new, old = runs(MANY, **{last: {"bugs": 1}})
    arms = [line.split("|")[1].strip() for line in lines(new, old) if line.startswith("| ")]
    assert arms[arms.index("arm") + 2 :][:2] == ["ar", last]


def test_the_command_line_writes_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a workflow that has nothing to post."""
    for name, speedups in (("new", SPEEDUPS | {"linear": 1.0}), ("old", SPEEDUPS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run_content(speedups)))
    arguments = ("report", tmp_path / "new.json", f"--baseline={tmp_path / 'old.json'}", "--format=comment")
    assert exit_code(monkeypatch, *arguments) == 0
    told = capsys.readouterr().out
    assert "**1 of 10 verdicts fail**" in told
    assert "| REGRESSED | linear | time |" in told


def test_a_comment_on_quality_tells_what_is_unexpected() -> None:
    """Guards against a long page where one sentence is enough, and a failure that is missing from it."""
    run = whole_quality_run()
    arm = run.judged_arms[0]
    checks = [
        MarginCheck(arm, "nll", Outcome.FAIL, Outcome.PASS, "too much"),
        MarginCheck(arm, "kl", Outcome.PASS, Outcome.PASS, "little"),
    ]
    text = quality_tables.comment(run, checks, "q.json")
    assert "**1 of 2 outcomes are not as expected**: 1 FAIL, 1 PASS." in text
    assert f"| {arm} | ΔNLL | FAIL | too much |" in text
    assert text.count("\n") <= MOST_LINES
    assert "**No outcome is unexpected**: 1 PASS." in quality_tables.comment(run, checks[1:])
    unjudged = [MarginCheck(arm, "nll", None, Outcome.PASS, "no margin is set")]
    assert "**Nothing was judged**: 1 not judged." in quality_tables.comment(run, unjudged)
