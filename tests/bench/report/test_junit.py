"""JUnit XML as the suites write it, in both families."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from specdecode.bench.gate.blame import Blame
from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.report.junit import quality_properties, verdict_properties
from specdecode.bench.runs.statistics import Estimate
from specdecode.evals.margins import MarginCheck, Outcome
from tests.helpers.characters import save
from tests.helpers.suites import run_pytest

ONE_ARM = (
    *(
        "--benchmark",
        "--tiny",
        "--prompts=prose@40:2",
        "--repeats=3",
        "--max-new-tokens=4",
        "--device=cpu",
        "--dtype=float32",
    ),
    *("--backend=eager", "-k", "lookup and not hf and not aware", "-W", "error", "--gate=off"),
)
# The elements that the schema of Jenkins (junit-10.xsd) allows below a test's entry.
BELOW_A_TEST = {"skipped", "error", "failure", "system-out", "system-err"}

Properties = dict[str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a model for this module alone: runs of one model write one journal, and another worker may run at the same
    time.
    """
    return f"--target={save(tmp_path_factory.mktemp('models') / 'model')}"


@pytest.fixture(scope="module")
def baseline(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("baseline") / "run.json"
    done = run_pytest(*ONE_ARM, model, f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    return file


def properties(element: ET.Element) -> Properties:
    """Return the properties of a test or of a suite, whose names must be unique."""
    found = [(one.attrib["name"], one.attrib["value"]) for one in element.findall("properties/property")]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("family", ["xunit1", "xunit2"])
def test_junit_has_the_measures_and_the_verdicts(family: str, model: str, baseline: Path, tmp_path: Path) -> None:
    """Guards against results that a CI system shows only as passed or failed, and against XML that it refuses."""
    file, kept = tmp_path / "junit.xml", tmp_path / "run.json"
    done = run_pytest(
        *(*ONE_ARM, model, f"--baseline={baseline}", f"--benchmark-json={kept}"),
        *(f"--junitxml={file}", "-o", f"junit_family={family}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    (suite,) = ET.parse(file).getroot()
    tests = {test.attrib["name"]: test for test in suite.findall("testcase")}
    if family == "xunit2":
        assert {child.tag for child in suite} <= {"properties", "testcase"}
        assert not [child.tag for test in tests.values() for child in test if child.tag not in BELOW_A_TEST]
        by_test: dict[str, Properties] = {name: {} for name in tests}
        for name, value in properties(suite).items():
            test, _, measure = name.rpartition(".")
            by_test[test][measure] = value
    else:
        by_test = {name: properties(test) for name, test in tests.items()}
    assert by_test.keys() == {f"test_{name}]" for name in ("speed[lookup", "gate[lookup-time", "gate[lookup-counters")}
    (test,) = json.loads(kept.read_text())["benchmarks"]
    measured = by_test["test_speed[lookup]"]
    assert {name: float(value) for name, value in measured.items()} == test["extra_info"]
    assert {"speedup", "speedup_low", "speedup_high", "throughput", "mean_acceptance_length"} <= measured.keys()
    time = by_test["test_gate[lookup-time]"]
    assert float(time["change_low"]) <= float(time["change"]) <= float(time["change_high"])
    assert time["verdict"] in set(Verdict)
    assert by_test["test_gate[lookup-counters]"]["verdict"] == "PASS"
    assert "within 2%" in by_test["test_gate[lookup-counters]"]["reason"]


def test_a_verdicts_properties_hold_its_blame() -> None:
    """Guards against a trend of slowdowns that does not show which part moved."""
    change, blame = Estimate(0.9, 0.8, 0.95), Blame({"acceptance length": 0.0, "drafting": 0.1})
    told = verdict_properties(Judgement("tree", "time", Verdict.REGRESSED, "slow", change, blame))
    assert {name: told[name] for name in ("verdict", "change", "change_low", "change_high")} == {
        **{"verdict": "REGRESSED", "change": 0.9, "change_low": 0.8, "change_high": 0.95}
    }
    assert told["blame_acceptance_length"] == 0.0
    assert told["blame_drafting"] == pytest.approx(0.105, abs=1e-3)
    counters = verdict_properties(Judgement("tree", "counters", Verdict.MISSING, "gone"))
    assert counters == {"arm": "tree", "gate": "counters", "verdict": "MISSING", "reason": "gone"}


def test_an_outcomes_properties_hold_its_cost() -> None:
    """Guards against a quality trend of only passed and failed."""
    check = MarginCheck("int8", "nll", Outcome.PASS, Outcome.PASS, "little")
    told = quality_properties(check, Estimate(0.1, 0.05, 0.2))
    assert told == {
        **{"arm": "int8", "measure": "nll", "outcome": "PASS", "expected": "PASS", "reason": "little"},
        **{"cost": 0.1, "cost_low": 0.05, "cost_high": 0.2},
    }
    assert "cost" not in quality_properties(check, None)
