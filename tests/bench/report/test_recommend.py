"""The recommendation: from run files of fixed content, and by a time-boxed run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.measure import time_boxed
from specdecode.bench.report.advice import sentences
from specdecode.bench.report.contest import Recommendation
from specdecode.bench.report.recommend import Advice, is_hopeless, recommend
from specdecode.bench.runs.file import read, run_json
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.evals.data import token_prompts
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.speed_runs import speed_arm, speed_run

LOOKUP, LINEAR = {"drafter": "lookup", "k": 5}, {"drafter": "model", "k": 5}
TREE = {"drafter": "model", "shape": "best-first"}
WINDOW, INT8 = {"policy": "sink-window", "cache": 64}, {"quantize": "int8"}
PLAIN, ASSISTED = {"peer": "generate"}, {"peer": "assisted"}
THROUGHPUT, LOSSY = "highest throughput", "highest throughput, if loss is acceptable"


def of(advice: Advice, aim: str = THROUGHPUT) -> Recommendation:
    (found,) = (each for each in advice.recommendations if each.aim == aim)
    return found


# Throughput, and ties.


def test_the_fastest_is_recommended_with_what_it_beats() -> None:
    """Guards against recommending a slower arm or a peer's arm, and against another arm's numbers, or void ones."""
    run = speed_run(
        lookup=speed_arm(1.5, LOOKUP),
        linear=speed_arm(2.0, LINEAR),
        hf_generate=speed_arm(0.9, PLAIN),
        hf=speed_arm(2.5, ASSISTED),
        hf_wrong=speed_arm(3.0, ASSISTED, bugs=1),
    )
    found = of(recommend(run))
    assert found.arm == "linear"
    assert found.over["ar"].value == pytest.approx(2.0, rel=0.02)
    assert found.over["hf-generate"].value == pytest.approx(2.2, rel=0.02)
    assert found.beats.keys() == {"ar", "lookup"}
    assert found.beats["lookup"].value == pytest.approx(run.speedup("linear", over="lookup").value)
    assert found.beats["lookup"].low < 4 / 3 < found.beats["lookup"].high
    assert (found.tied, found.settle) == ({}, "")
    assert "Transformers is faster: hf, 1.25 [" in found.reason
    assert "hf-wrong" not in found.reason


def test_what_is_not_told_apart_is_named_and_the_simplest_of_it_recommended() -> None:
    """Guards against advice to load a draft model for a difference within the noise."""
    run = speed_run(
        tree=speed_arm(2.05, TREE, scatter=0.05),
        linear=speed_arm(2.03, LINEAR, scatter=0.05),
        lookup=speed_arm(2.0, LOOKUP, scatter=0.05),
        slow=speed_arm(1.2, LOOKUP | {"k": 1}),
    )
    found = of(recommend(run))
    assert found.arm == "lookup"
    assert found.tied.keys() == {"tree", "linear"}
    assert found.beats.keys() == {"ar", "slow"}
    assert "It ties with these arms" in " ".join(sentences(found))


def test_more_prompts_are_said_to_settle_what_they_do() -> None:
    """Guards against advice to measure so many prompts that leaves the tie open, or many more prompts than needed."""

    def found(prompts: int) -> Recommendation:
        speeds = [1.15 * math.exp(0.2 * (-1) ** i) for i in range(prompts)]
        return of(
            recommend(speed_run(ar=speed_arm(1.0, {}, prompts=prompts), lookup=speed_arm(speeds, LOOKUP, scatter=0.0)))
        )

    few = found(6)
    assert (few.arm, few.tied.keys()) == ("ar", {"lookup"})
    needed = int(few.settle.split()[1])
    assert few.settle == (
        f"About {needed} prompts like these would show whether lookup is faster than ar; this run has 6."
    )
    assert [found(prompts).arm for prompts in (needed - 2, needed)] == ["ar", "lookup"]


@pytest.mark.parametrize(("speed", "floor"), [(0.8, 0.01), (1.0, 0.01), (1.03, 0.05)])
def test_plain_decoding_is_recommended_where_nothing_is_faster(speed: float, floor: float) -> None:
    """Guards against recommending a draft without a gain, or with a gain within the machine's noise."""
    found = of(recommend(speed_run(floor, lookup=speed_arm(speed, LOOKUP, scatter=0.001))))
    assert found.arm == "ar"
    assert "draft nothing" in found.reason
    assert ("lookup" in found.beats) == (speed < 0.9)
    assert ("differ no more than two runs of the same code" in found.settle) == (speed >= 1.0)


def test_an_arm_must_itself_be_shown_to_be_faster() -> None:
    """Guards against recommending an arm because another one beats plain decoding."""
    wild = [0.6, 4.0, 0.8, 3.5, 5.0, 0.7, 4.5, 0.9]
    found = of(recommend(speed_run(wild=speed_arm(wild, LOOKUP), steady=speed_arm(1.3, LINEAR))))
    assert found.arm == "steady"
    assert found.tied.keys() == {"wild"}


def test_the_best_of_many_equals_is_not_taken_for_better() -> None:
    """Guards against selection bias: of a dozen arms that are only as fast as plain decoding, some look faster by
    chance. With separate intervals, one in three runs would recommend such an arm.
    """
    random = np.random.default_rng(3)
    wrong = 0
    for _ in range(60):
        arms = {}
        for k in range(1, 13):
            speeds = [math.exp(each) for each in random.normal(0.0, 0.1, 6)]
            arms[f"k{k}"] = speed_arm(speeds, LOOKUP | {"k": k}, scatter=0.0)
        wrong += of(recommend(speed_run(0.0, ar=speed_arm(1.0, {}, prompts=6), **arms))).arm != "ar"
    assert wrong <= 3


# Memory, balance, long context.


def test_memory_bound_takes_the_least_that_is_not_slower() -> None:
    """Guards against memory saved at the price of speed, a choice by a kilobyte, and another arm's savings."""
    run = speed_run(
        ar=speed_arm(1.0, {}, cache=20e6),
        half=speed_arm(1.0, WINDOW, cache=10e6),
        slow=speed_arm(0.8, WINDOW | INT8, cache=10e6, weights=50e6),
        int8=speed_arm(1.001, INT8, cache=20e6, weights=50e6),
        lookup_int8=speed_arm(1.5, LOOKUP | INT8, cache=20.4e6, weights=50e6),
        lookup_half=speed_arm(2.0, LOOKUP | WINDOW, cache=10e6),
    )
    found = of(recommend(run), "memory-bound")
    assert found.arm == "lookup-int8"
    assert found.beats.keys() == {"int8"}
    assert "Holds 70.4 MB of weights and KV, 49.6 MB or 41% less than plain decoding" in found.reason


def test_memory_of_a_draft_that_is_not_told_is_not_taken_for_nothing() -> None:
    """Guards against an arm that saves a cache but loads a model whose memory is not counted."""
    drafting = speed_arm(1.5, LINEAR | WINDOW, cache=1e6)
    found = of(recommend(speed_run(linear=drafting, window=speed_arm(1.0, WINDOW, cache=3e6))), "memory-bound")
    assert found.arm == "window"
    found = of(recommend(speed_run(linear=drafting)), "memory-bound")
    assert found.arm == "linear"
    assert "draft's own weights and KV come on top" in found.reason
    after_lookup = {**LINEAR, "drafter": "lookup+model"}
    found = of(recommend(speed_run(cascade=speed_arm(1.5, after_lookup | WINDOW, cache=1e6))), "memory-bound")
    assert "draft's own weights and KV come on top" in found.reason


def test_what_saves_nothing_is_not_recommended_for_memory() -> None:
    """Guards against advice to accept loss for a thousandth of the memory, and against a slow arm that noise lets pass
    as fast.
    """
    run = speed_run(0.5, tiny=speed_arm(1.0, WINDOW, cache=9.5e6), slow=speed_arm(0.9, INT8, weights=50e6))
    found = of(recommend(run), "memory-bound")
    assert found.arm == "ar"
    assert "saves 1% of its 110.0 MB" in found.reason


def test_balanced_is_the_best_with_half_the_cache() -> None:
    """Guards against a balance of speed alone, or of memory alone."""
    run = speed_run(
        lookup=speed_arm(2.0, LOOKUP),
        window=speed_arm(1.1, WINDOW, cache=5e6),
        lookup_window=speed_arm(1.6, LOOKUP | WINDOW, cache=5e6),
        larger=speed_arm(1.9, LOOKUP | WINDOW | {"cache": 128}, cache=6e6),
    )
    advice = recommend(run)
    found = of(advice, "balanced")
    assert found.arm == "lookup-window"
    assert "5.0 MB instead of 10.0" in found.reason
    assert found.beats.keys() == {"window"}
    assert of(advice).arm == "lookup"


def test_without_a_small_cache_balance_is_speed() -> None:
    """Guards against no answer, or plain decoding, where every arm has a full cache."""
    found = of(recommend(speed_run(lookup=speed_arm(2.0, LOOKUP))), "balanced")
    assert found.arm == "lookup"
    assert "speed alone decides" in found.reason


def test_long_context_takes_a_bounded_cache_that_was_full() -> None:
    """Guards against a cache bound that was never reached, and a cache that grows."""
    run = speed_run(
        lookup=speed_arm(3.0, LOOKUP),
        roomy=speed_arm(1.5, WINDOW | {"cache": 4096}, cache=10e6),
        small=speed_arm(1.1, WINDOW, cache=2e6, evictions=9),
    )
    found = of(recommend(run), "long context")
    assert found.arm == "small"
    assert "2.0 MB at 40 tokens" in found.reason
    assert "plain decoding's KV is 10.0 MB at 40, and grows by 50.0 MB per thousand tokens" in found.reason
    assert of(recommend(speed_run(lookup=speed_arm(3.0, LOOKUP))), "long context").arm is None


# Arms without evidence.


def test_lossy_arms_stand_apart() -> None:
    """Guards against a lossy arm recommended for speed to a user who did not accept loss."""
    lossy = speed_arm(2.0, LOOKUP | WINDOW, cache=2e6)
    advice = recommend(speed_run(lookup=speed_arm(1.5, LOOKUP), lossy=lossy))
    assert of(advice).arm == "lookup"
    assert of(advice, LOSSY).arm == "lossy"
    assert "75% of its tokens come before its text first differs from ar's" in of(advice, LOSSY).reason
    assert of(advice, LOSSY).beats["lookup"].value == pytest.approx(4 / 3, rel=0.02)
    advice = recommend(speed_run(lookup=speed_arm(2.0, LOOKUP), lossy=lossy))
    assert LOSSY not in [each.aim for each in advice.recommendations]


def test_lossless_is_preferred_where_it_ties() -> None:
    """Guards against loss without a gain."""
    small = speed_arm(1.5, LOOKUP | {"k": 2}, cache=4e6)
    assert of(recommend(speed_run(lossy=speed_arm(1.5, WINDOW, cache=4e6), small=small)), "balanced").arm == "small"


def test_a_speedup_from_loops_does_not_count() -> None:
    """Guards against recommending a draft for its speed on looping texts, and against ignoring an arm with another
    cache and no draft, whose speed does not depend on the text.
    """
    speeds = [5.0, 5.0, 5.0, 1.1, 1.1, 1.1, 1.1, 1.1]
    loops = [0, 1, 2]
    run = speed_run(
        ar=speed_arm(1.0, {}, loops=loops),
        lookup=speed_arm(speeds, LOOKUP, loops=loops),
        linear=speed_arm(1.4, LINEAR, loops=loops),
        window=speed_arm(1.2, WINDOW, loops=range(8)),
        hf=speed_arm(speeds, ASSISTED, loops=loops),
    )
    advice = recommend(run)
    found = of(advice)
    assert found.arm == "linear"
    assert "3 of its 8 texts loop, and are not counted" in found.reason
    unsettled = [1.6, 1.6, 1.6, 0.8, 1.6, 0.8, 1.6, 1.6]
    undecided = of(recommend(speed_run(lookup=speed_arm(unsettled, LOOKUP, loops=loops))))
    assert undecided.settle.endswith("this run has 5 whose texts do not loop, of 8.")
    assert found.beats["lookup"].value == pytest.approx(1.4 / 1.1, rel=0.02)
    assert found.over["hf"].value == pytest.approx(1.4 / 1.1, rel=0.02)
    assert "window" not in advice.left_out
    advice = recommend(
        speed_run(
            lookup=speed_arm(5.0, LOOKUP, loops=range(7)), hf=speed_arm([5.0] * 6 + [1.0] * 2, ASSISTED, loops=range(6))
        )
    )
    assert advice.left_out["lookup"].startswith("7 of its 8 text(s) loop")
    assert of(advice).arm == "ar"
    assert "Transformers is faster" not in of(advice).reason


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (speed_arm(3.0, LOOKUP, bugs=1), "1 wrong output(s)"),
        (speed_arm(3.0, LOOKUP | {"batch": 4}), "it decodes several prompts at once"),
        (speed_arm(3.0, LINEAR | {"replay": 0.9}, synthetic=True), "its acceptance was set, not measured"),
        (speed_arm(3.0, LOOKUP, prompts=1), "1 prompt(s) are too few"),
    ],
    ids=["wrong", "batch", "synthetic", "one prompt"],
)
def test_what_shows_nothing_is_left_out_and_told(record: ArmRecord, why: str) -> None:
    """Guards against a winner by wrong outputs, by a set acceptance or by luck."""
    advice = recommend(speed_run(best=record, lookup=speed_arm(1.5, LOOKUP | {"k": 1})))
    assert advice.left_out["best"].startswith(why)
    assert {each.arm for each in advice.recommendations} == {"lookup", "ar", None}


def test_what_is_replayed_is_recommended_for_its_acceptance() -> None:
    """Guards against a synthetic speed shown without its set acceptance, and an arm that wins by a higher set
    acceptance.
    """

    def run(**arms: ArmRecord) -> Advice:
        return recommend(speed_run(ar=speed_arm(1.0, {}, synthetic=True), **arms))

    def replayed(speed: float, k: int, replay: float) -> ArmRecord:
        return speed_arm(speed, LINEAR | {"k": k, "replay": replay}, synthetic=True, loops=range(8))

    advice = run(
        k3_a60=replayed(1.2, 3, 0.6),
        k5_a60=replayed(1.0, 5, 0.6),
        k3_a80=replayed(1.5, 3, 0.8),
        k5_a80=replayed(2.0, 5, 0.8),
        k1_a90=replayed(1.0, 1, 0.9),
        lookup=speed_arm(4.0, LOOKUP, synthetic=True),
    )
    found = [(each.arm, each.assumed) for each in advice.recommendations if each.aim == THROUGHPUT]
    assert found == [("k3-a60", 0.6), ("k5-a80", 0.8), ("ar", 0.9)]
    assert "the weights are random" in advice.left_out["lookup"]
    assert any("hypothetical" in note for note in advice.notes)


def test_arms_are_given_up_once_they_are_shown_to_be_slow() -> None:
    """Guards against an arm that is dropped by bad luck or despite a needed bounded cache, or that is never dropped."""

    def hopeless(record: ArmRecord) -> bool:
        prompts = len(record.rows)
        return is_hopeless(speed_run(ar=speed_arm(1.0, {}, prompts=prompts), other=record), "other")

    assert hopeless(speed_arm(0.7, LINEAR, prompts=4))
    assert hopeless(speed_arm(1.5, LINEAR, bugs=1))
    assert not hopeless(speed_arm(0.7, LINEAR, prompts=2, scatter=0.0))
    assert not hopeless(speed_arm([0.4, 0.9, 0.6, 1.2], LINEAR))
    assert not hopeless(speed_arm(0.7, WINDOW, prompts=4))
    assert not hopeless(speed_arm(0.7, PLAIN, prompts=4))
    assert not hopeless(speed_arm(1.2, LINEAR, prompts=4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


# The command.


def written(folder: Path, run: RunFile) -> str:
    file = folder / "run.json"
    file.write_text(json.dumps({"specdecode": run_json(run)}))
    return str(file)


def test_the_command_tells_each_aim_with_lines_to_copy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards against code to copy that the terminal's width breaks, and an aim that is left out."""
    run = speed_run(
        identity=("abacus", "a long name " * 20, "", "float64"),
        lookup=speed_arm(1.5, LOOKUP),
        window=speed_arm(1.0, WINDOW, cache=2e6, evictions=3),
    )
    assert exit_code(monkeypatch, "recommend", written(tmp_path, run)) == 0
    out = capfd.readouterr().out
    for aim, chosen in ((THROUGHPUT, "lookup"), ("memory-bound", "window"), ("balanced", "window")):
        assert f"\n{aim}: {chosen}\n" in out
    assert "\nlong context: window\n" in out
    assert "lossy 75%" in out
    assert out.count(code_snippet(run, "lookup")) == out.count(code_snippet(run, "window")) == 1


def test_programs_get_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Guards against invalid JSON, as for an unknown interval, and against plain decoding, a valid answer, reported as
    a failure.
    """
    run = speed_run(ar=speed_arm(1.0, {}, prompts=2), lookup=speed_arm([1.0, 9.0], LOOKUP))
    file = written(tmp_path, run)
    assert exit_code(monkeypatch, "recommend", file, file, "--json") == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = json.loads(capfd.readouterr().out, parse_constant=refuse)
    assert first == second
    found = first["recommendations"][0]
    assert (found["aim"], found["arm"]) == (THROUGHPUT, "ar")
    assert found["tied"]["lookup"] == {"value": pytest.approx(3.0, rel=0.02), "low": 0.0, "high": None}
    assert found["measures"]["speedup"] == 1.0
    assert "NoDraft" in found["code"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either run files or, to measure first, a model with --target"),
        (["RUN", "--target", "t"], "give either run files or"),
        (["RUN", "--budget-minutes", "1"], "--budget-minutes is of no use without --target"),
        (["nowhere.json"], "nowhere.json cannot be read"),
        (["OLD"], "is of an older version, without the settings of its arms: measure it again"),
        (["--target", "shape:tiny", "--budget-minutes", "0"], "the budget is 0.0 minutes"),
        (["--target", "shape:tiny", "--preset", "nothing"], "no preset is named 'nothing'"),
        (["--target", "shape:tiny", "--device", "cpu", "--backend", "packd"], "no backend is named 'packd'"),
        (["--target", "shape:tiny", "--device", "cpu", "--preset", "CODE"], "all arms of the preset are from code"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    reason: str,
) -> None:
    """Guards against a traceback, and an option that is silently ignored."""
    old = tmp_path / "old.json"
    content = json.loads(json.dumps({"specdecode": run_json(speed_run(lookup=speed_arm(2.0, LOOKUP)))}))
    for record in content["specdecode"]["arms"].values():
        del record["options"]
    old.write_text(json.dumps(content))
    code = tmp_path / "code.toml"
    code.write_text('prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 1\n[arms]\nar = { call = "own:make" }\n')
    files = {"OLD": str(old), "RUN": written(tmp_path, speed_run()), "CODE": str(code)}
    monkeypatch.chdir(tmp_path)
    assert exit_code(monkeypatch, "recommend", *(files.get(argument, argument) for argument in arguments)) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert reason in said.err
    assert said.err.count("\n") == 1


def test_a_file_needs_no_torch(tmp_path: Path) -> None:
    """Guards against seconds of imports to read a file."""
    script = (
        "import sys; from specdecode import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "recommend", written(tmp_path, speed_run(lookup=speed_arm(2.0, LOOKUP)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PromptLookup" in done.stdout


# Time-boxed runs.

ARMS = """
prompts = "prose:2,humaneval:2"
max_new_tokens = 12
repeats = 1
lengths = [6]

[arms]
lookup = { drafter = "lookup", k = 3 }
linear = { drafter = "model", k = 3 }
universal = { drafter = "universal", k = 3 }
ar-48 = { policy = "sink-window", cache = 48 }
ar-4 = { policy = "sink-window", cache = 4 }
hf-generate = { peer = "generate" }
hf-universal = { peer = "universal", k = 3 }
"""

LEFT_OUT = """
from pathlib import Path

class Engine:
    def __init__(self, *names):
        pass

    def __call__(self, prompt, count):
        raise RuntimeError("no licence")

    def close(self):
        Path("closed").touch()
"""


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None, model: str) -> list[str]:
    """Return the arguments that measure a tiny model in an empty folder.

    The slowest parts are off: profiles, long prompts, shape checks and garbage collection over all other tests.
    """

    def counters_run(arm: Any, *arguments: Any) -> CountersRun:
        arm.run(*arguments)
        return CountersRun(weight_bytes=1e6)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time_boxed, "counters_run", counters_run)

    def shortened(*arguments: Any) -> tuple[dict[str, list[int]], list[str]]:
        prompts, origins = token_prompts(*arguments)
        return {prompt: tokens[:60] for prompt, tokens in prompts.items()}, origins

    monkeypatch.setattr(time_boxed, "token_prompts", shortened)
    monkeypatch.setattr(time_boxed, "roofline_of", lambda *given: 1.0)
    Path("own.toml").write_text(ARMS)
    return ["--target", model, "--device", "cpu", "--dtype", "float64", "--preset", "own.toml"]


@pytest.mark.parametrize(("minutes", "prompts"), [("0.0001", 2), ("10", 4)])
def test_a_time_boxed_run_measures_whole_prompts_of_all_sets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str], minutes: str, prompts: int
) -> None:
    """Guards against a run that exceeds its time, advice from a single prompt, and a run that is not saved."""
    assert (
        exit_code(
            monkeypatch,
            "recommend",
            *measuring,
            "--draft",
            "layers:0-2",
            "--budget-minutes",
            minutes,
            "--out",
            "r.json",
        )
        == 0
    )
    told = capfd.readouterr()
    assert f"{prompts} prompts were measured; the run is in r.json" in told.err
    assert "Left out: universal, hf-universal: target and draft share a vocabulary" in told.out
    assert "Left out: ar-4: " in told.out
    run = read(Path("r.json"))
    assert [prompt.partition("/")[0] for prompt in run.header.outputs] == ["prose", "humaneval"] * (prompts // 2)
    assert run.arms.keys() == {"ar", "lookup", "linear", "ar-48", "hf-generate"}
    assert all(set(run.arms[name].rows) == set(run.header.outputs) for name in ("ar", "ar-48", "hf-generate"))
    assert run.lengths == [6, 12]
    assert exit_code(monkeypatch, "recommend", "r.json") == 0
    assert capfd.readouterr().out.startswith(told.out.partition("Left out")[0])


def test_without_a_draft_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str]
) -> None:
    """Guards against refusing a run because one arm lacks its draft model, a file whose path is not printed, and one
    that cannot be read, because an arm is in it whose reference arm is not.

    Also against code that keeps its memory after it was left out.
    """
    Path("left_out.py").write_text(LEFT_OUT)
    monkeypatch.syspath_prepend(Path.cwd())
    own = Path("own.toml")
    own.write_text(
        own.read_text()
        + 'both = { drafter = "lookup", k = 3, baseline = "linear" }\n'
        + 'left-out = { call = "left_out:Engine" }\n'
    )
    assert exit_code(monkeypatch, "recommend", *measuring, "--budget-minutes", "0.0001") == 0
    told = capfd.readouterr()
    assert "needs a draft model" in told.out
    assert "Left out: both: its reference arm linear is left out" in told.out
    assert "Left out: left-out: arm 'left-out': it raised RuntimeError: no licence" in told.out
    assert Path("closed").exists()
    (file,) = Path("results").glob("*/*-float64-own.json")
    assert str(file) in told.err
    assert read(file).arms.keys() == {"ar", "lookup", "ar-48", "hf-generate"}


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interruption_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str], finished: int
) -> None:
    """Guards against minutes of measuring lost by Ctrl-C."""
    measure, calls = time_boxed.measure_block, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return measure(*arguments, **named)

    monkeypatch.setattr(time_boxed, "measure_block", interrupted)
    assert exit_code(monkeypatch, "recommend", *measuring, "--out", "r.json") == (0 if finished else 130)
    assert Path("r.json").exists() == (finished > 0)
    if finished:
        assert len(read(Path("r.json")).header.outputs) == finished
        assert f"{finished} prompts were measured" in capfd.readouterr().err


def test_hopeless_arms_are_measured_no_further(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str]
) -> None:
    """Guards against time spent on arms that cannot win, and a run file in which the other arms do not fit."""
    monkeypatch.setattr(time_boxed, "is_hopeless", lambda run, arm: arm == "lookup" and len(run.header.outputs) == 2)
    assert exit_code(monkeypatch, "recommend", *measuring, "--out", "r.json") == 0
    run = read(Path("r.json"))
    assert {name: len(record.rows) for name, record in run.arms.items()} == {
        "ar": 4,
        "lookup": 2,
        "ar-48": 4,
        "hf-generate": 4,
    }
    assert f"{THROUGHPUT}: " in capfd.readouterr().out


def test_servers_are_no_methods_to_recommend(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str]
) -> None:
    """Guards against a preset of servers that is refused as one of code."""
    head = ARMS[: ARMS.index("[arms]")]
    Path("own.toml").write_text(f'{head}[arms]\nar = {{ server = {{ url = "http://127.0.0.1:1/v1" }} }}\n')
    assert exit_code(monkeypatch, "recommend", *measuring, "--out", "r.json") == 2
    assert "all arms of the preset are from code or servers: there is no method" in capfd.readouterr().err


def test_what_others_are_compared_with_is_measured_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], measuring: list[str]
) -> None:
    """Guards against a traceback, or a false reason, after a slow reference arm was dropped."""
    own = Path("own.toml")
    own.write_text(own.read_text() + 'both = { drafter = "lookup", k = 3, baseline = "lookup" }\n')
    monkeypatch.setattr(time_boxed, "is_hopeless", lambda run, arm: arm in ("lookup", "ar-48"))
    assert exit_code(monkeypatch, "recommend", *measuring, "--out", "r.json") == 0
    rows = {name: len(record.rows) for name, record in read(Path("r.json")).arms.items()}
    assert (rows["lookup"], rows["both"], rows["ar-48"]) == (4, 4, 1)
    assert "did not decode" not in capfd.readouterr().out
