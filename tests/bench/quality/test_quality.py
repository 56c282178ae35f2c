"""The quality suite behind its command: presets, resumed sessions, costs, verdicts and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from specdecode import LM, load
from specdecode.bench.options import Options
from specdecode.bench.plan import Setup
from specdecode.bench.quality import quality_session as quality
from specdecode.bench.quality.plan import QualityPlan, resolve_quality
from specdecode.bench.quality.quality_tables import costs, markdown, notes, retrieval, scores
from specdecode.evals.margins import MarginCheck, Outcome, check_margins, read_margins
from specdecode.evals.needle import Retrieval
from specdecode.evals.perplexity import negative_log_likelihoods
from specdecode.evals.quality_presets import make_decode_path, quality_preset
from specdecode.evals.results import (
    Answer,
    Document,
    NeedleTrial,
    QualityRun,
    Score,
    Trace,
)
from specdecode.evals.results_file import read, write
from specdecode.evals.shuffled import Shuffled
from specdecode.evals.tasks import TASKS
from tests.helpers.models import build, lm, quantisable
from tests.helpers.quality_runs import HEADER
from tests.helpers.root import ROOT

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "window-8": {"policy": "sink-window", "cache": 8},
    "window-16": {"policy": "sink-window", "cache": 16},
    "any-8": {"policy": "random", "cache": 8, "control": "window-8"},
}


def trace(cost: float, since: list[int], unsure: float = 0.0) -> Trace:
    """Return a trace with this cost at each token behind an eviction, and a cost before it that must not count."""
    own = [cost if distance else 100.0 for distance in since] if any(since) else [cost] * len(since)
    return Trace([2.0 + each for each in own], [abs(each) + unsure for each in own], [1, 0, 1, 0], since)


def example(window: float = 0.1, control: float = 0.9) -> QualityRun:
    """Return five documents of four tokens with slightly different costs. The wider window evicts nothing."""
    documents = [
        Document(
            f"prose/{i}",
            [2.0] * 4,
            {
                "full": trace(0.0, [0] * 4),
                "window-8": trace(window + 0.01 * i, [0, 0, 1, 2]),
                "window-16": trace(0.5, [0] * 4),
                "any-8": trace(control + 0.01 * i, [0, 1, 2, 1]),
            },
        )
        for i in range(5)
    ]
    needles = [
        NeedleTrial(arm, length, depth, -1.0 if arm == "full" else -20.0, [0, 0], arm == "full")
        for arm in ("full", "window-8")
        for length in (8, 16)
        for depth in (0.0, 1.0)
    ]
    return QualityRun(HEADER, ARMS, documents, needles, answers(reference="1111100000", full="1111100000"))


def answers(**passed: str) -> list[Answer]:
    """Return by arm whether each of ten problems is solved. The window loses three and wins one."""
    given = passed | {"window-8": "0001100001"}
    return [
        Answer(arm, "humaneval", f"humaneval/{i}", "" if bit == "1" else "AssertionError:", 3, "...")
        for arm, bits in given.items()
        for i, bit in enumerate(bits)
    ]


MARGINS = {"full": {"nll": 0.01, "kl": 0.01}, "window-8": {"nll": 0.3, "kl": 0.3}, "window-16": {"nll": 0.3}}


def outcomes(checks: list[MarginCheck]) -> dict[tuple[str, str], Outcome | None]:
    return {(check.arm, check.measure): check.outcome for check in checks}


def test_costs_are_those_of_the_tokens_behind_an_eviction() -> None:
    """Guards against a cost diluted by tokens before the first eviction."""
    run = example()
    cost = run.cost("window-8", "nll")
    assert cost is not None
    assert (cost.low, cost.value, cost.high) == (
        pytest.approx(0.1, abs=0.01),
        pytest.approx(0.12),
        pytest.approx(0.14, abs=0.01),
    )
    assert run.tokens("window-8") == 10
    assert run.tokens("full") == 20
    assert run.cost("window-16", "nll") is None
    assert run.divergence("window-8", 1.0) == pytest.approx(0.14)
    assert run.agreement("window-8") == 0.5
    assert run.perplexity() == pytest.approx(2.718281828**2)


def test_curves_are_means_over_places() -> None:
    """Guards against a curve over position that is really over the order of documents."""
    run = example()
    assert run.curve("any-8", "kl", "since") == [(1.0, pytest.approx(0.92)), (2.0, pytest.approx(0.92))]
    assert run.curve("full", "agrees", "position") == [(1.0, 1.0), (2.0, 0.0), (3.0, 1.0), (4.0, 0.0)]
    assert run.curve("full", "agrees", "position", bins=2) == [(1.5, 0.5), (3.5, 0.5)]
    assert run.curve("full", "kl", "since") == []


def test_lossy_parts_pass_within_their_margins_and_controls_beyond_them() -> None:
    """Guards against a suite that passes whatever a cache loses."""
    good = outcomes(check_margins(example(), MARGINS))
    assert good[("full", "nll")] == good[("window-8", "kl")] == Outcome.PASS
    assert good[("any-8", "nll")] == good[("any-8", "kl")] == Outcome.FAIL
    assert good[("window-16", "nll")] is None
    bad = {(each.arm, each.measure): each for each in check_margins(example(window=0.5, control=0.1), MARGINS)}
    assert bad[("window-8", "nll")].outcome is Outcome.FAIL
    assert bad[("window-8", "nll")].expected is Outcome.PASS
    assert bad[("any-8", "nll")].outcome is Outcome.PASS
    assert bad[("any-8", "nll")].expected is Outcome.FAIL
    assert outcomes(check_margins(example(window=0.28), MARGINS))[("window-8", "nll")] is Outcome.INCONCLUSIVE
    for synthetic, margins in ((True, MARGINS), (False, {})):
        run = replace(example(), header=replace(HEADER, synthetic=synthetic))
        assert set(outcomes(check_margins(run, margins)).values()) == {None}


def test_flips_are_counted_from_the_reference() -> None:
    """Guards against lost problems reported as won, and against a pass rate that hides flips both ways."""
    run = example()
    assert run.score("window-8", "humaneval") == Score(count=10, passed=3, lost=3, won=1)
    assert run.score("reference", "humaneval") == Score(count=10, passed=5, lost=0, won=0)
    assert run.score("window-16", "humaneval") is None
    loss = run.cost("window-8", "humaneval")
    assert loss is not None
    assert loss.value == 0.2
    assert run.cost("window-8", "gsm8k") is None


def test_tasks_are_judged_by_margins_too() -> None:
    """Guards against a pass rate without a verdict, a few problems accepted as proof, and an unavailable task reported
    as passed.
    """
    margins = {"full": {"humaneval": 0.35}, "window-8": {"humaneval": 0.35, "gsm8k": 0.1}}
    found = {(each.arm, each.measure): each for each in check_margins(example(), margins)}
    assert found[("full", "humaneval")].outcome is Outcome.PASS
    assert found[("window-8", "humaneval")].outcome is Outcome.INCONCLUSIVE
    assert found[("window-8", "gsm8k")].outcome is None
    assert found[("window-8", "gsm8k")].reason == "gsm8k is not available"
    assert ("any-8", "humaneval") not in found
    assert "the least detectable cost is 0." in found[("window-8", "humaneval")].reason
    strict = {(each.arm, each.measure): each.outcome for each in check_margins(example(), {"full": {"humaneval": 0.1}})}
    assert strict[("full", "humaneval")] is Outcome.INCONCLUSIVE
    assert strict[("window-8", "humaneval")] is None


def test_a_run_travels_as_json(tmp_path: Path) -> None:
    """Guards against a report with facts that the file lacks, and against an incomplete file that is read."""
    file = tmp_path / "run.json"
    file.write_text(write(example()))
    assert read(file) == example()
    content = json.loads(file.read_text())
    content["quality"]["documents"][0]["arms"]["full"]["kl"].pop()
    for text, reason in [
        (json.dumps(content), "full does not have a value for each of the 4 tokens of prose/0"),
        ("{", "cannot be read"),
        ("{}", "no run of `pytest --quality`"),
        ('{"quality": {"format": 0}}', "its format is 0"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read(file)
    content = json.loads(write(example()))
    content["quality"]["answers"][-1]["problem"] = "humaneval/x"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="window-8 answered 'humaneval/x', which the reference did not"):
        read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "nothing.json")


def test_a_file_of_an_earlier_version_is_read_and_written_alike(tmp_path: Path) -> None:
    """Guards against file keys that are renamed with the code, and a header that loses unknown keys."""
    file = ROOT / "tests" / "data" / "quality-run.json"
    run = read(file)
    assert write(run) == file.read_text(encoding="utf-8")
    assert run.header.tasks is not None
    assert run.header.tasks.problems == {"humaneval": 2}
    assert run.header.k == 3
    assert run.score("full", "humaneval") == Score(2, 0, 0, 0)
    assert run.judged_arms == list(run.arms)
    assert len(check_margins(run, {})) == 2 * len(run.arms) + len(run.header.tasks.arms)
    # A file from before there were tasks.
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["quality"]["answers"], content["quality"]["header"]["tasks"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(content))
    assert read(older) == replace(run, header=replace(run.header, tasks=None), answers=[])
    del content["quality"]["header"]["window"]
    older.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no run of `pytest --quality`: it has no 'window'"):
        read(older)


@pytest.mark.parametrize("content", ['{"margins": {"a": {"ppl": 1}}}', '{"margins": {"a": {"kl": -1}}}', "{}"])
def test_margins_are_read_with_suspicion(tmp_path: Path, content: str) -> None:
    """Guards against a misspelt margin that is never applied."""
    file = tmp_path / "margins.json"
    assert read_margins(file) == {}
    file.write_text('{"margins": {"a": {"kl": 0.1, "gsm8k": 0.2}}}')
    assert read_margins(file) == {"a": {"kl": 0.1, "gsm8k": 0.2}}
    file.write_text(content)
    with pytest.raises(ValueError, match="margin"):
        read_margins(file)


def test_the_margins_that_come_along_are_those_of_arms() -> None:
    """Guards against the margin of a renamed arm, which judges nothing, and against one margin for an arm that decodes
    differently in two presets.
    """
    folder = ROOT / "baselines" / "quality"
    arms = quality_preset("quick").arms
    for file in folder.glob("*.json"):
        margins = read_margins(file)
        assert margins.keys() == {name for name, entry in arms.items() if "control" not in entry}
    assert quality_preset("ci").arms.items() <= arms.items()


# The report.


def test_the_page_tells_costs_needles_and_what_is_not_as_expected() -> None:
    """Guards against verdicts that are missing from the page, and a table whose rows do not fit its columns."""
    run = example(window=0.5)
    page = markdown(run, check_margins(run, MARGINS))
    assert page.index("**window-8** is FAIL") < page.index("| arm |")
    assert "| window-16 | ΔNLL | not judged |" in page
    assert "| any-8 | ΔNLL | FAIL, as expected |" in page
    assert "GSM8K was not asked: gsm8k is not available." in page
    for grid in (costs(run, check_margins(run, MARGINS)), retrieval(run), scores(run, check_margins(run, MARGINS))):
        assert {len(row) for row in grid.rows} == {len(grid.columns)}
    assert retrieval(run).rows[0] == ["full", "8", "1/1 (-1.0)", "1/1 (-1.0)"]
    rows = scores(run, check_margins(run, {"window-8": {"humaneval": 0.35}})).rows
    assert [row[:3] for row in rows] == [["HumanEval", "reference", "5/10"], ["HumanEval", "full", "5/10"], rows[2][:3]]
    assert rows[2][2:8] == ["3/10", "30% [11%, 60%]", "3", "1", "0.62", rows[2][7]]
    assert rows[2][-1] == "INCONCLUSIVE"
    assert "steps of 4 tokens" in notes(run)[0]
    windowed = replace(run, header=replace(HEADER, window=512, stride=128, synthetic=True))
    assert "in windows of 512 tokens, 128 tokens apart" in notes(windowed)[0]
    assert "only a trial" in notes(windowed)[-1]


def test_a_report_needs_no_torch() -> None:
    """Guards against a report, or the help of the command line, that waits for torch to be imported."""
    program = (
        "import sys; import specdecode.bench.quality.quality_tables, specdecode.bench.plugin;"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Presets.


@pytest.mark.parametrize(("name", "judged"), [("quick", 4), ("ci", 2), ("tasks", 0), ("tiny", 3)])
def test_presets_can_be_run(name: str, judged: int) -> None:
    """Guards against an arm that fails only at the first document, a needle without a search, and an unknown task."""
    preset = quality_preset(name)
    target = LM(build(quantisable("llama") | {"max_position_embeddings": 2048}))
    paths = {arm: make_decode_path(arm, entry, target, preset.k, "eager") for arm, entry in preset.arms.items()}
    controls = {arm for arm, entry in preset.arms.items() if "control" in entry}
    assert len(controls) == judged
    assert (preset.tasks.problems.keys() if preset.tasks else set()) <= TASKS.keys()
    for grid in (preset.needle, preset.tasks):
        assert not controls & set(grid.arms if grid else ())
    for arm, path in paths.items():
        assert (path.lm is target) == ("quantize" not in preset.arms[arm])
        assert path.policy.interval == 0 or path.policy.keeps + path.policy.interval == preset.arms[arm]["cache"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"polcy": "random"}, "unknown options: polcy"),
        ({"policy": "nothing"}, "no cache policy is named 'nothing'"),
        ({"policy": "key-norm", "sinks": 0}, "key-norm has no setting 'sinks'"),
        ({"quantize": "int3"}, "int3"),
        ({"k": 0}, "K is 0"),
    ],
)
def test_an_arm_that_cannot_be_is_told(entry: dict[str, Any], reason: str) -> None:
    """Guards against a misspelt key that silently turns an arm into another one."""
    with pytest.raises(ValueError, match=reason):
        make_decode_path("it", entry, lm("llama"), 3, "eager")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("texts =", "cannot be read"),
        ('texts = "prose"', "lacks k, arms"),
        ('texts = ["prose"]\nk = 3\n[arms]', r"texts is \['prose'\]: it must be a string"),
        ('texts = "prose"\nk = 3\n[arms]\nfull = 31', "arms: full is 31: it must be a table"),
        ('texts = "prose"\nk = 3\nwindow = "512"\n[arms]', "window is '512': it must be a whole number"),
        ('texts = "prose"\nk = 3\n[arms]\na = { control = "b" }', "has no arm 'b'"),
        ('texts = "prose"\nk = 3\n[arms]\na = { control = ["b"] }', r"control: a is \['b'\]: it must be a string"),
        (
            'texts = "prose"\nk = 3\n[arms]\n[tasks]\narms = []\nmax_new_tokens = 0\nproblems = { gsm8k = 1 }',
            "tasks: max_new_tokens is 0: give 1 or more",
        ),
        ('texts = "prose"\nk = 3\n[arms]\na = {}\n[tasks]\narms = ["a"]', "tasks lacks problems, max_new_tokens"),
        (
            'texts = "prose"\nk = 3\n[arms]\n[tasks]\narms = ["b"]\nmax_new_tokens = 1\nproblems = { gsm8k = 1 }',
            "has no arm 'b'",
        ),
    ],
)
def test_a_preset_that_is_none_is_told(tmp_path: Path, text: str, reason: str) -> None:
    """Guards against a control of a missing arm, which is then judged by no margin."""
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        quality_preset(str(file))
    with pytest.raises(ValueError, match="choose from ci, quick, tasks, tiny"):
        quality_preset("nothing")


def test_the_shuffled_cache_holds_the_same_tokens_in_another_order() -> None:
    """Guards against a worthless negative control: one that loses tokens too, or changes nothing."""
    target = lm("llama")
    slots = target.new_slots(40)
    target.forward(slots, torch.arange(30))
    window = make_decode_path("it", {"policy": "sink-window", "cache": 20}, target, 3, "eager").policy
    kept, expected = Shuffled(window).keep(slots).tolist(), window.keep(slots).tolist()
    assert sorted(kept) == expected != kept
    text = [7 * i % 90 for i in range(60)]
    paths = [
        make_decode_path("it", {"policy": policy, "cache": 20}, target, 3, "eager")
        for policy in ("shuffled", "sink-window")
    ]
    shuffled, plain = (negative_log_likelihoods(path, text) for path in paths)
    assert (shuffled - plain).abs().max() > 0.01


# Sessions.


def plan(root: Path, **others: Any) -> QualityPlan:
    """Return the plan of a rehearsal, changed by the options."""
    given: dict[str, Any] = {
        "root": root,
        "device": "cpu",
        "dtype": "float32",
        "prompts": "prose@30:2",
        "backend": "eager",
        "tiny": True,
    }
    return resolve_quality(Options(**given | others))


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make GSM8K unavailable, whoever runs the tests."""
    monkeypatch.delenv("SPECDECODE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.mark.usefixtures("_no_hub")
def test_a_session_that_is_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes of lost work, and pieces that are judged twice or not at all after a resume."""
    selected = {"full", "sink-window-16"}
    whole = quality.measure(plan(tmp_path), selected)
    assert {document.id.partition("/")[0] for document in whole.run.documents} == {"prose@30"}
    assert len(whole.run.documents) == 2
    assert len(whole.run.needles) == 2 * 2 * 2
    assert max(whole.run.documents[0].arms["full"].kl) < 1e-6
    stored = read(whole.file)
    assert stored == whole.run
    assert stored.datetime == whole.run.datetime
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(stored.datetime)) < timedelta(hours=1)
    sought = quality.look_for
    calls = []

    def interrupted(*arguments: Any) -> Retrieval:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sought(*arguments)

    monkeypatch.setattr(quality, "look_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(plan(tmp_path), selected)
    (journal,) = (tmp_path / "results").glob("*.jsonl")
    assert journal.read_text().count("\n") == 1 + 2 + 2
    monkeypatch.setattr(quality, "compare", None)
    again = quality.measure(plan(tmp_path, resume=True), selected)
    assert again.run == whole.run
    assert len(calls) == 3 + 6
    assert not journal.exists()


@pytest.mark.parametrize(
    ("needle", "reason"),
    [
        ({"corpus": "pros"}, "no data set is named 'pros'"),
        ({"corpus": "pg-19"}, "pg-19 is not available"),
        ({"depths": [0.5, 2]}, "depth is 2"),
        ({"lengths": [300, 5]}, "no needle can be put into 5 tokens"),
        ({"lengths": [4000]}, "but the context of shape:tiny holds"),
    ],
)
@pytest.mark.usefixtures("_no_hub")
def test_a_wrong_needle_is_told_before_the_documents_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needle: dict[str, Any], reason: str
) -> None:
    """Guards against minutes of reading that end at a name that is misspelt."""
    monkeypatch.setattr(quality, "compare", None)
    right = plan(tmp_path)
    assert right.preset.needle is not None
    wrong = replace(right, preset=replace(right.preset, needle=replace(right.preset.needle, **needle)))
    with pytest.raises(ValueError, match=reason):
        quality.measure(wrong, {"full"})


@pytest.mark.usefixtures("_no_hub")
def test_answers_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a resumed session that answers a problem twice, with another arm, or another problem."""
    preset = tmp_path / "own.toml"
    preset.write_text(
        'texts = "prose@20:1"\nk = 3\n[arms]\nwindow = { policy = "sink-window", cache = 128 }\n[tasks]\n'
        'arms = ["window"]\nmax_new_tokens = 6\nproblems = { gsm8k = 1, humaneval = 2 }\n'
    )
    given: dict[str, Any] = {"preset": str(preset), "target": "shape:tiny", "prompts": None, "tiny": False}
    whole = quality.measure(plan(tmp_path, **given), {"window"})
    asked = [(each.problem, each.arm) for each in whole.run.answers]
    assert [arm for _, arm in asked] == ["reference", "window"] * 2
    assert len({problem for problem, _ in asked}) == 2
    assert whole.run.score("window", "humaneval") == Score(count=2, passed=0, lost=0, won=0)
    assert {each.tokens for each in whole.run.answers} == {6}
    assert all(each.wrong for each in whole.run.answers)
    reasons = {each.measure: each.reason for each in whole.checks}
    assert "random weights" in reasons["humaneval"]
    assert "gsm8k_test.jsonl or .parquet" in reasons["gsm8k"]
    answered = quality.answer
    calls = []

    def interrupted(*arguments: Any) -> Answer:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(*arguments)

    monkeypatch.setattr(quality, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(plan(tmp_path, **given), {"window"})
    capfd.readouterr()
    again = quality.measure(plan(tmp_path, **given, resume=True), {"window"})
    # Five pieces: one document and four answers.
    assert "resuming: 3 of 5 pieces are there" in capfd.readouterr().err
    assert again.run == whole.run
    assert len(calls) == 3 + 2
    longer = quality.measure(plan(tmp_path, **given, max_new_tokens=9), {"window"})
    assert {each.tokens for each in longer.run.answers} == {9}


@pytest.mark.usefixtures("_no_hub")
def test_arms_without_their_package_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that ends because one arm is unavailable: here INT8, of a model that is INT8 already."""
    monkeypatch.setattr(Setup, "load_target", lambda setup: load("shape:tiny", quantize="int8", device="cpu"))
    found = quality.measure(plan(tmp_path), {"full", "int8-sink-window-16"})
    assert found.run.judged_arms == ["full"]
    reasons = [each.reason for each in found.checks if each.arm == "int8-sink-window-16"]
    assert reasons == ["left out: this model or device does not support its quantised weights"] * 3
    assert {each.arm for each in found.run.answers} == {"reference", "full"}
    with pytest.raises(ValueError, match=r"^int8-sink-window-16 is left out: "):
        quality.measure(plan(tmp_path), {"int8-sink-window-16"})
    assert [row[0] for row in costs(found.run, found.checks).rows] == ["reference", "full"]
