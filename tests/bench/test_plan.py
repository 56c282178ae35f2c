"""Options are resolved once, and wrong ones are reported before anything is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdecode.bench.command_line import share
from specdecode.bench.measure.header import run_header
from specdecode.bench.measure.speed_session import _ways, _what_must_be_the_same
from specdecode.bench.options import Options
from specdecode.bench.plan import Plan, Setup, resolve
from specdecode.bench.plugin import _parameters
from specdecode.bench.presets import Preset
from specdecode.bench.quality.plan import QualityPlan, resolve_quality
from specdecode.bench.runs.records import Header
from specdecode.core.ranks import Ranks
from specdecode.support.files import slug, write_whole
from tests.helpers.elsewhere import commit
from tests.helpers.root import ROOT
from tests.helpers.suites import run_pytest

COUNTER = """
import os, sys
from specdecode.support import environment

def note(what):
    os.write(log, f"{what}\\n".encode())

def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith(("quick.toml", "baseline.json")):
        note("/".join(str(arguments[0]).split(os.sep)[-3:]))
    elif event == "subprocess.Popen" and "HEAD:./specdecode/bench/presets/quick.toml" in arguments[1]:
        note("git show")

def counted(device, ask=environment.hardware):
    note("hardware")
    return ask(device)

log = os.open(os.environ["COUNTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
hardware = environment.hardware
# Modules that are imported by now have the function under their own name.
for module in [module for module in sys.modules.values() if vars(module).get("hardware") is hardware]:
    module.hardware = counted
sys.addaudithook(audit)
"""


@pytest.mark.parametrize("judge", ["--baseline", "--against"])
def test_a_session_asks_once(judge: str, tmp_path: Path) -> None:
    """Guards against options that each hook of pytest resolves again."""
    (tmp_path / "counter.py").write_text(COUNTER)
    baseline = tmp_path / "baseline.json"
    baseline.write_text(next((ROOT / "baselines").glob("*threads/smollm2*-quick.json")).read_text())
    value = str(baseline) if judge == "--baseline" else "HEAD"
    done = run_pytest(
        *("-p", "counter", "--benchmark", "--quality", "--collect-only", "--device", "cpu", f"{judge}={value}"),
        PYTHONPATH=str(tmp_path),
        COUNTS=str(tmp_path / "counts"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compared = "/".join(baseline.parts[-3:]) if judge == "--baseline" else "git show"
    expected = {"hardware", "bench/presets/quick.toml", "evals/presets/quick.toml", compared}
    assert Counter((tmp_path / "counts").read_text().splitlines()) == dict.fromkeys(expected, 1)


def plan(root: Path, **given: Any) -> Plan:
    return resolve(Options(**{"root": root, "device": "cpu", "tiny": True} | given))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"preset": "nothing"}, "no preset is named 'nothing'"),
        ({"device": "nothing"}, "device 'nothing' cannot be used here"),
        ({"dtype": "nothing"}, "dtype 'nothing' is not one of"),
        ({"backend": "nothing"}, "no backend is named 'nothing'"),
        ({"backend": "graph"}, "need a GPU"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give 1 or more"),
        ({"repeats": 0}, "repeats is 0"),
        ({"again": float("inf")}, "again is inf: it is a share of the time, 0 or more"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"tolerance": 0.05, "until": 0.05}, "the tolerance of 5.0% allows it: give a larger --until"),
        ({"budget_minutes": 5.0}, "--budget-minutes limits the time of --until: give --until, too"),
        ({"until": 0.05, "budget_minutes": 0.0}, r"the budget is 0\.0 minutes: give more than 0"),
        ({"baseline": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"against": "HEAD", "baseline": "some.json"}, "--baseline does not go with --against"),
        ({"against": "HEAD", "resume": True}, "--resume does not go with --against"),
        ({"against": "HEAD", "eos": True}, "--eos does not go with --against"),
        ({"against": "HEAD", "draft": "d", "draft_device": "meta"}, "--draft-device does not go with --against"),
        (
            {"draft_device": "meta"},
            "'layers:0-1' shares the weights of its target, wherever they are: leave out --draft",
        ),
        ({"draft_device": "meta", "target": "t"}, "--draft-device is for a draft model: name it with --draft"),
        ({"draft_device": "nothing", "draft": "d"}, "device 'nothing' cannot be used here"),
        ({"draft_device": "cpu", "draft": "d", "tp": "auto"}, "--draft-device does not go with --tp"),
        ({"device_map": "auto"}, "device='cpu' is for a model on one device: leave out device, or device_map"),
        ({"device_map": "auto", "device": None, "tp": "auto"}, "tp='auto' splits each weight, and device_map spreads"),
        (
            {"device_map": "auto", "device": None, "backend": "compile"},
            "layers over several devices run on the backend",
        ),
        (
            {"device_map": "auto", "device": None},
            "--device-map auto spreads layers over several GPUs, and there are 1:",
        ),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    tmp_path: Path, given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a minute of loading before a misspelt option is reported."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=reason):
        plan(tmp_path, **given)


def test_several_devices_are_hardware_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against times on several devices that are judged by those of one, and models that are loaded elsewhere
    than the hardware's name says."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    alone = plan(tmp_path, draft="d").identity.hardware

    def named(setup: Setup) -> str:
        versions: Any = _ways(False, Ranks(), setup) | {"gpu": alone}
        header = Header(setup.identity, 1, {}, 0.0, versions=versions)
        assert (header.devices, header.draft_device) == (setup.devices, str(setup.draft_device or ""))
        assert header.on_gpu  # by the name alone
        return setup.identity.hardware

    spread: dict[str, Any] = {"device": None, "device_map": "auto"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named(plan(tmp_path, draft="d", draft_device="cpu").setup) == alone
    assert named(plan(tmp_path, draft="d", draft_device="meta").setup) == f"{alone}-draft-on-meta"
    both = plan(tmp_path, draft="d", draft_device="meta", **spread).setup
    assert named(both) == f"{alone}-layers-x2-draft-on-meta"
    loaded: dict[str, Any] = {}
    monkeypatch.setattr("specdecode.bench.plan.load", lambda name, **how: loaded.update(how))
    both.load_target()
    assert (loaded["device"], loaded["device_map"]) == (None, "auto")


@pytest.mark.parametrize("text", ["5", "0", "100%", "-5%", "nan"])
def test_what_is_no_share_is_told(text: str) -> None:
    """Guards against `--until 5` that is met at once, by a user who means five percent."""
    assert share("5%") == share("0.05") == 0.05
    with pytest.raises(ValueError, match=f"^{text} is not a share above 0 and below 1$"):
        share(text)


def test_arms_that_only_the_baseline_has_are_judged(tmp_path: Path) -> None:
    """Guards against a regression that passes because its arm was removed from the preset."""
    baseline = next((ROOT / "baselines" / "any").glob("smollm2*-quick.json"))
    preset = tmp_path / "own.toml"
    preset.write_text('prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\nar = {}\nnew = {}\n')
    judged = plan(tmp_path, preset=str(preset), baseline=str(baseline))
    assert judged.judged_arms[:2] == ["ar", "new"]
    assert {"lookup", "linear-k5"} < set(judged.judged_arms)
    assert len(judged.judged_arms) == len(set(judged.judged_arms))
    assert judged.entries({"new"}).keys() == {"ar", "new"}
    assert judged.entries({"lookup"}).keys() == {"ar"}


@pytest.mark.parametrize("stem", ["My own_drafter", "测试"])
def test_a_run_of_any_presets_name_can_be_read(tmp_path: Path, stem: str) -> None:
    """Guards against a run file that every command refuses, because the preset's file has another name than a path's
    part may have."""
    preset = tmp_path / f"{stem}.toml"
    preset.write_text('prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\nar = {}\n')
    name = plan(tmp_path, preset=str(preset)).identity.preset
    assert name == f"{slug(stem)}.tiny" != ".tiny"
    assert slug(name) == name


def test_what_a_resumed_run_must_share_has_the_models_and_the_reference_arm(tmp_path: Path) -> None:
    """Guards against blocks of two drafts in one run, because file names have fewer characters than paths, and against
    a KeyError after another arm became the reference arm."""

    def values(baseline: str = "ar", **models: str) -> dict[str, Any]:
        preset = tmp_path / "own.toml"
        arms = "[arms]\nar = {}\nother = {}\n"
        preset.write_text(f'prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\nbaseline = "{baseline}"\n{arms}')
        of_session = plan(tmp_path, preset=str(preset), **models)
        return {"file": of_session.journal} | _what_must_be_the_same(of_session, {}, (), ())

    models = {"target": "./target", "draft": "./draft"}
    before = values(**models)
    for name, other in {
        "target": values(**models | {"target": "../target"}),
        "draft": values(**models | {"draft": "../draft"}),
        "baseline": values("other", **models),
    }.items():
        assert [key for key in before if before[key] != other[key]] == [name]


@pytest.mark.parametrize("models", [{}, {"target": "/models/" + "target/" * 40, "draft": "/models/" + "draft/" * 40}])
def test_every_file_of_a_session_can_be_written(tmp_path: Path, models: dict[str, str]) -> None:
    """Guards against a session that cannot write its files, or writes over another's, because the paths of its models
    are long: they are in the files' names."""
    other = {**models, "target": models.get("target", "") + "other"}
    named = []
    for own in (models, other):
        judged = plan(tmp_path, **own)
        quality = resolve_quality(Options(root=tmp_path, device="cpu", tiny=True, **own))
        files = [tmp_path / judged.identity.file, judged.journal, quality.file, quality.journal]
        for file in (*files, quality.margins_path):
            write_whole(file, "")
        named.append(files)
    assert not set(named[0]) & set(named[1])
    assert named[0][0].name.endswith(f"-{judged.identity.dtype}-{judged.identity.preset}.json")


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        ({}, 0.05),
        ({"against": "HEAD"}, 0.02),
        ({"until": 0.05}, 0.02),
        ({"until": 0.03}, 0.012),
        ({"until": 0.2}, 0.05),
        ({"until": 0.05, "tolerance": 0.04}, 0.04),
    ],
)
def test_the_tolerance_lets_a_run_see_what_until_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], tolerance: float
) -> None:
    """Guards against `--until 5%` that measures until its time is spent, since its tolerance hides 5 %."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    commit(tmp_path)
    of_session = plan(tmp_path, **given)
    assert of_session.tolerance == pytest.approx(tolerance)
    header = run_header(of_session, {}, 0.01, prompts={}, roofline=0.0, versions={}, before={})
    assert header.tolerance == of_session.tolerance


def test_presets_of_any_editor_are_read(tmp_path: Path) -> None:
    """Guards against a preset that Windows editors save with a byte-order mark, and against another encoding without
    the file's name."""
    text = 'prompts = "prose:1"\r\nmax_new_tokens = 8\r\nrepeats = 1\r\n[arms]\r\nar = {}\r\n'
    file = tmp_path / "own.toml"
    file.write_bytes(text.encode("utf-8-sig"))
    assert plan(tmp_path, preset=str(file)).preset.arms == {"ar": {}}
    file.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"own\.toml cannot be read: it is no text in UTF-8"):
        plan(tmp_path, preset=str(file))


def test_a_preset_is_made_tiny_whatever_it_holds() -> None:
    """Guards against outputs of no token, and a traceback in place of the sentence on a cache's type."""
    arms = {"ar": {}, "window": {"policy": "sink-window", "cache": "64"}, "other": {"cache": 64}}
    tiny = Preset(arms, "prose:1", 500, 1, lengths=[20, 250]).tiny()
    assert tiny.lengths == [1, 6]
    assert [entry.get("cache") for entry in tiny.arms.values()] == [None, "64", 8]


def test_arms_of_the_other_commit_are_found_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a removed arm that is not missed, because the preset's path is absolute or pytest runs below."""
    file = tmp_path / "own.toml"
    both = 'prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\nar = {}\nlookup = { drafter = "lookup" }\n'
    file.write_text(both)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    commit(tmp_path)
    file.write_text(both.replace('lookup = { drafter = "lookup" }\n', ""))
    monkeypatch.chdir(tmp_path / "below")
    for preset in (str(file), "../own.toml"):
        assert plan(tmp_path, preset=preset, against="HEAD").compared_arms == ["ar", "lookup"]


def test_arms_of_heads_are_not_missing_where_there_is_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a comparison of two equal commits that fails for every target without a trained head."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(
        'prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\nar = {}\nhead = { drafter = "head", k = 2 }\n'
    )
    commit(tmp_path)
    for target, arms in (("gpt2", ["ar"]), ("smollm2-135m", ["ar", "head"])):
        planned = plan(tmp_path, preset="own.toml", against="HEAD", target=target)
        assert (list(planned.preset.arms), planned.compared_arms) == (arms, arms)


def test_only_arms_of_the_fixtures_own_tests_are_selected() -> None:
    """Guards against a session of both suites, and of parametrised tests beside them, that cannot be measured."""
    tests = [
        SimpleNamespace(fixturenames=["speed_run"], callspec=SimpleNamespace(params={"arm": "ar"})),
        SimpleNamespace(fixturenames=["quality_run"], callspec=SimpleNamespace(params={"cost": ("full", "nll")})),
        SimpleNamespace(fixturenames=[], callspec=SimpleNamespace(params={"width": 1})),
        SimpleNamespace(fixturenames=["speed_run"]),
    ]
    request: Any = SimpleNamespace(fixturename="speed_run", session=SimpleNamespace(items=tests))
    assert _parameters(request) == [{"arm": "ar"}]


def test_what_only_recommends_reads_no_baseline(tmp_path: Path) -> None:
    """Guards against a recommendation that fails because of a damaged baseline."""
    file = tmp_path / "baselines" / plan(tmp_path).identity.file
    file.parent.mkdir(parents=True)
    file.write_text("{")
    options = Options(root=tmp_path, device="cpu", tiny=True)
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(options)
    assert resolve(options, judged=False).baseline is None


def test_a_quality_session_is_planned_before_a_model_is_loaded(tmp_path: Path) -> None:
    """Guards against margins of another target, and options that the quality suite ignores."""

    def quality(**given: Any) -> QualityPlan:
        return resolve_quality(Options(**{"root": tmp_path, "device": "cpu", "tiny": True} | given))

    planned = quality(prompts="prose@30:2", max_new_tokens=3)
    assert planned.preset.texts == "prose@30:2"
    assert planned.preset.tasks is not None
    assert planned.preset.tasks.max_new_tokens == 3
    assert planned.margins == {}
    planned.margins_path.parent.mkdir(parents=True)
    planned.margins_path.write_text('{"margins": {"full": {"nll": 0.5}}}')
    assert quality(prompts="prose@30:2").margins == {"full": {"nll": 0.5}}
    for given, reason in (
        ({"backend": "nothing"}, "no backend"),
        ({"preset": "nothing", "tiny": False}, "no preset"),
        ({"draft": "d", "draft_device": "cpu"}, "--draft-device does not go with --quality"),
    ):
        with pytest.raises(ValueError, match=reason):
            quality(**given)
