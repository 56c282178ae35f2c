"""One session of `pytest --benchmark`: from its plan to the measured run and the gate's judgements."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.models import load_models
from specdecode.bench.gate.baselines import ever_sees
from specdecode.bench.gate.series import yardstick
from specdecode.bench.gate.verdicts import Judgement, Verdict, judge, judges_times, noise_in_history, open_arms
from specdecode.bench.measure.bandwidth import roofline_of
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.measure.header import run_header, run_versions
from specdecode.bench.measure.journal import Journal, source_digest
from specdecode.bench.measure.side_by_side import SideBySide, measure_side_by_side
from specdecode.bench.measure.turns import reason_against
from specdecode.bench.measure.until import Until
from specdecode.bench.measure.versions import Versions, WorkerProcess, dependencies, versions
from specdecode.bench.plan import Plan, Setup
from specdecode.bench.presets import Preset
from specdecode.bench.report.captions import judged_by, type_of
from specdecode.bench.runs.file import KEY, run_json
from specdecode.bench.runs.names import OWN_TYPE
from specdecode.bench.runs.records import ArmRecord, Header, RunFile
from specdecode.bench.runs.statistics import Estimate
from specdecode.core.ranks import Ranks
from specdecode.evals.data import token_prompts
from specdecode.models.lm import LM
from specdecode.support.environment import conditions
from specdecode.support.files import write_whole
from specdecode.support.progress import progress

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A measured run, and the gate's judgements of it.

    Attributes:
        title: the models and the size of the experiment, in words.
        origins: origins of the prompts.
        run: the run, as in its file.
        durations: seconds of each run, by arm.
        wrong: prompts on which an arm's output is wrong, by arm.
        judged_by: the run that the gate compared with, in words.
        judgements: the gate's judgements.
        journal: journal of the finished blocks, to delete after the run's file is written; None for runs side by side.
        outside: arms whose code is not in the repository, so that two commits run the same.
    """

    title: str
    origins: list[str]
    run: RunFile
    durations: dict[str, list[float]]
    wrong: dict[str, list[str]]
    judged_by: str
    judgements: list[Judgement]
    journal: Journal | None = None
    outside: Sequence[str] = ()


def measure(plan: Plan, selected: Collection[str], new: str | None = None, file: Path | None = None) -> JudgedRun:
    """Measure the selected arms of the preset, and judge them by the baseline or by another commit.

    Args:
        plan: plan of the session.
        selected: names of the selected arms.
        new: the commit to measure against the plan's commit; None for the working tree.
        file: path for the unfinished run, rewritten after each block; None for no such file. A run against another
            commit writes none.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model cannot be loaded or a file cannot be judged.
    """
    for arm, entry in plan.entries(selected).items():
        ArmSpec.from_entry(arm, entry)  # raises for a wrong entry before a model is loaded
    if plan.against is not None:
        return _measure_against(plan, plan.against, selected, new)
    return _measure(plan, selected, file)


def _measure(plan: Plan, selected: Collection[str], file: Path | None) -> JudgedRun:
    """Measure the working tree alone."""
    entries = plan.entries(selected)
    models = load_models(plan.setup.names, plan.setup.backend, entries.values(), **plan.setup.sharing)
    ranks = Ranks() if models.target is None else models.target.ranks
    prompts, origins = token_prompts(plan.preset.prompts, models.encoder)
    stop_token_ids = _stop_token_ids(plan, models.target)
    arms = [models.arm(arm, entry, plan.preset.lengths, stop_token_ids) for arm, entry in entries.items()]
    whole = _reason_for_whole_runs(plan, arms, ranks)
    in_turns = plan.until is not None and whole is None
    versions = run_versions(plan.identity.target, models.backend_name) | _ways(in_turns, ranks, plan.setup)
    same = _what_must_be_the_same(plan, prompts, stop_token_ids, arms) | {"arms": entries, "versions": versions}
    journal = Journal(plan.journal, same, plan.resume)
    finished, failures = ranks.agreed((journal.blocks(), journal.failures()))
    before, roofline = conditions(plan.setup.device), roofline_of(models.target, prompts)
    noise = {} if plan.baseline is None else noise_in_history(plan.baseline)
    blocks = len(prompts) * plan.preset.repeats

    def run_of(results: Results, budget_spent: bool = False) -> RunFile:
        header = run_header(
            plan,
            results.outputs(),
            results.floor,
            prompts=prompts,
            roofline=roofline,
            versions=versions | _server_versions(arms),
            before=before,
            budget_spent=budget_spent,
            left=max(0, blocks - len(results.blocks)),
            unselected=_unselected(plan, entries, selected),
        )
        return RunFile(Path(), header, results.records())

    def keep(results: Results) -> None:
        journal.add_block(results.blocks[-1], results.failures)
        if file is not None:
            write_whole(file, json.dumps({KEY: run_json(run_of(results))}) + "\n")

    def still_open(results: Results, aim: float) -> set[str]:
        run = run_of(results)
        judgements = _judge(plan, run, noise)
        # A run whose times nothing judges may become a baseline: repeat all arms until its noise hides no slowdown.
        if not judges_times(judgements):
            return set(run.arms) if ever_sees(run, plan.tolerance) > aim else set()
        arms = open_arms(judgements, aim) & set(selected)
        return arms | {yardstick(arm, run) for arm in arms}

    until = _until(plan, still_open, ranks)
    with progress() as show:
        if plan.resume:
            show(0, 1, f"resuming: {len(finished)} of {blocks} blocks are there")
        results = experiment(
            arms,
            prompts,
            plan.preset.max_new_tokens,
            plan.preset.repeats,
            progress=show,
            finished=finished,
            failures=failures,
            keep=keep,
            baseline=plan.preset.baseline,
            until=until,
            again=plan.again,
            in_turns=in_turns,
        )
    # The header has conditions and times of one process, so all processes use the first one's.
    run = ranks.agreed(run_of(results, until is not None and until.budget_spent))
    judged = judged_by(run, plan.baseline, plan.baselines / plan.identity.file)
    if plan.until is not None and whole is not None:
        judged += f" Whole runs are compared, not turns with {plan.preset.baseline}: {whole}."
    return JudgedRun(
        title=_title(plan, str(models), plan.setup.device, models.chosen_backend, prompts),
        origins=[*origins, *_texts_sent(arms)],
        run=run,
        durations={arm: results.durations(arm) for arm in run.arms},
        wrong={arm: results.wrong(arm) for arm in run.arms},
        judged_by=judged,
        judgements=_judge(plan, run, noise),
        journal=journal,
    )


def _unselected(plan: Plan, entries: Collection[str], selected: Collection[str]) -> list[str]:
    """Return the judged arms that were not selected, and not measured for those that are compared with them."""
    return [arm for arm in plan.judged_arms if arm not in entries and arm not in selected]


def _reason_for_whole_runs(plan: Plan, arms: Sequence[Arm], ranks: Ranks) -> str | None:
    """Return why runs cannot take turns with the reference arm; None if they can."""
    if ranks.count > 1:
        return f"{ranks.count} processes decode together"
    if plan.preset.lengths:
        return "the preset has several lengths"
    return reason_against(arms, plan.preset.baseline)


def _ways(in_turns: bool, ranks: Ranks, setup: Setup) -> dict[str, str | int]:
    """Return the entries of a header's versions on how runs are made."""
    ways: dict[str, str | int] = {"turns": "steps"} if in_turns else {}
    ways |= {name: count for name, count in (("processes", ranks.count), ("devices", setup.devices)) if count > 1}
    return ways | ({} if setup.draft_device is None else {"draft device": str(setup.draft_device)})


def _what_must_be_the_same(
    plan: Plan, prompts: Mapping[str, list[int]], stop_token_ids: Sequence[int], arms: Sequence[Arm]
) -> dict[str, Any]:
    """Return the values that must be equal for blocks of an interrupted run to be used."""
    return {
        "identity": plan.identity.file.as_posix(),
        # Different names may give the same name of a file.
        "target": plan.identity.target,
        "draft": plan.identity.draft,
        "baseline": plan.preset.baseline,
        "prompts": prompts,
        "max_new_tokens": plan.preset.max_new_tokens,
        "lengths": plan.preset.lengths,
        "stop_token_ids": stop_token_ids,
        "code": source_digest(),
        "code of arms": {arm.name: arm.code for arm in arms if arm.foreign},
    }


def _until(plan: Plan, still_open: Callable[[T, float], set[str]], ranks: Ranks = Ranks()) -> Until[T] | None:
    """Return the rule for further repeats; None if the number of repeats is fixed.

    Args:
        plan: plan of the session.
        still_open: from the measurements and the slowdown that verdicts must detect, returns the arms with open
            verdicts.
        ranks: the processes that measure together.
    """

    def clock() -> float:
        return ranks.agreed(time.monotonic())

    if (aim := plan.until) is None:
        return None
    return Until(60 * plan.budget_minutes, lambda measured: still_open(measured, aim), clock, clock())


def _server_versions(arms: Sequence[Arm]) -> dict[str, str | int]:
    """Return the engine, the version and the model of each server, under the name of its first arm."""
    versions: dict[str, str | int] = {}
    seen: list[object] = []
    for arm in arms:
        if arm.server is not None and (server := arm.server.server) not in seen:
            seen.append(server)
            versions[f"server of {arm.name}"] = server.about
    return versions


def _texts_sent(arms: Sequence[Arm]) -> list[str]:
    """Return a note on servers that get prompts as text, as their token ids may differ from ours; [] if none do."""
    names = [arm.name for arm in arms if arm.server is not None and arm.server.server.spec.prompt == "text"]
    return [f"as text to {', '.join(names)}, whose servers tokenise it"] if names else []


def _stop_token_ids(plan: Plan, target: LM | None) -> Sequence[int]:
    """Return the ids of tokens that end an output."""
    if not plan.eos:
        return ()
    if target is None or not target.stop_token_ids:
        raise ValueError(f"{plan.identity.target} has no stop tokens here: leave out --eos")
    return target.stop_token_ids


def _judge(plan: Plan, run: RunFile, noise: Mapping[str, float]) -> list[Judgement]:
    """Judge a run by the baseline, if there is one. `noise` is that of the baseline's history."""
    if plan.baseline is None:
        return []
    return judge(run, plan.baseline, plan.tolerance, tolerances=plan.tolerances, noise=noise)


def _measure_against(plan: Plan, ref: str, selected: Collection[str], new_ref: str | None) -> JudgedRun:
    """Measure the working tree, or a commit, and another commit side by side."""
    entries = plan.entries(selected)
    worker_arguments = {
        "target": plan.identity.target,
        "draft": plan.identity.draft,
        "device": str(plan.setup.device),
        "dtype": None if plan.identity.dtype == OWN_TYPE else plan.identity.dtype,
        "backend": plan.setup.backend,
        "arms": entries,
    }
    before = conditions(plan.setup.device)
    with versions(plan.root, new_ref, ref, worker_arguments) as both:
        unsupported = _unsupported_arms(both, ref, plan.preset)
        arms = [arm for arm in entries if arm not in unsupported]
        both.use(both.new)
        prompts, origins = both.new.ask("prompts", spec=plan.preset.prompts)
        bandwidth = both.new.ask("roofline")
        about = both.new.about

        def both_runs(measured: SideBySide) -> tuple[RunFile, RunFile]:
            header = run_header(
                plan,
                measured.outputs("new"),
                measured.floor(),
                prompts=prompts,
                roofline=bandwidth,
                versions=about["versions"],
                before=before,
                budget_spent=measured.budget_spent,
                left=max(0, len(prompts) * plan.preset.repeats - len(measured.blocks)),
                unselected=_unselected(plan, entries, selected),
            )
            return (
                _one_version(measured, "new", both.new, header, arms),
                _one_version(measured, "old", both.old, header, arms),
            )

        def still_open(measured: SideBySide, aim: float) -> set[str]:
            judgements = _judge_against(plan, ref, *both_runs(measured), unsupported, measured.change)
            return open_arms(judgements, aim) & set(selected)

        with progress() as show:
            measured = measure_side_by_side(
                both,
                arms,
                prompts,
                plan.preset.max_new_tokens,
                plan.preset.repeats,
                progress=show,
                baseline=plan.preset.baseline,
                until=_until(plan, still_open),
                again=plan.again,
            )
    new, old = both_runs(measured)  # the conditions of the GPU after the run: the workers have left it
    outside = [arm for arm in arms if both.old.about["about"][arm].get("outside")]
    return JudgedRun(
        title=_title(plan, about["pair"], about["device"], about["backend"], prompts),
        origins=origins,
        run=new,
        durations={
            arm: [run.total_s for quartet in measured.quartets(arm) for run in quartet.new.runs] for arm in arms
        },
        wrong={
            arm: [quartet.prompt for quartet in measured.quartets(arm) if "bug" in quartet.new.checks] for arm in arms
        },
        judged_by=_judged_by_commit(plan, ref, both, outside, measured),
        judgements=_judge_against(plan, ref, new, old, unsupported, measured.change),
        outside=outside,
    )


def _unsupported_arms(both: Versions, ref: str, preset: Preset) -> dict[str, str]:
    """Return the arms that the other commit cannot build or compare, with the reasons.

    Raises:
        ValueError: the new version cannot build an arm, or the other commit cannot build the reference arm.
    """
    if refused := both.new.about["refused"]:
        raise ValueError(next(iter(refused.values())))
    refused_there: dict[str, str] = both.old.about["refused"]
    if preset.baseline in refused_there:
        raise ValueError(f"{ref} cannot be compared: {refused_there[preset.baseline]}")
    dependent = {arm: preset.baseline_of(arm) for arm in both.new.about["about"]}
    return refused_there | {
        arm: refused_there[baseline]
        for arm, baseline in dependent.items()
        if baseline in refused_there and arm not in refused_there
    }


def _one_version(
    measured: SideBySide, version: Literal["new", "old"], worker: WorkerProcess, header: Header, arms: Sequence[str]
) -> RunFile:
    """Return the run of one version, with its outputs and versions in the header."""
    records = {arm: measured.record(version, worker.name, arm, worker.about["about"][arm]) for arm in arms}
    header = replace(
        header, outputs=measured.outputs(version), versions=worker.about["versions"] | {"turns": "versions"}
    )
    return RunFile(Path(), header, records)


def _judge_against(
    plan: Plan, ref: str, new: RunFile, old: RunFile, unsupported: Mapping[str, str], change: Callable[[str], Estimate]
) -> list[Judgement]:
    """Judge a run by the other commit's. `change` returns an arm's new speed over its old speed."""
    # An arm that the working tree's preset lacks now must be reported as missing.
    retired = {arm: ArmRecord({}) for arm in plan.compared_arms if arm not in plan.preset.arms}
    old = replace(old, arms=old.arms | retired)
    judgements = judge(new, old, plan.tolerance, side_by_side=change, tolerances=plan.tolerances)
    for arm, reason in unsupported.items():
        why = f"{ref} cannot build this arm: {reason}"
        judgements += [Judgement(arm, gate, Verdict.NO_BASELINE, why) for gate in ("time", "counters")]
    return judgements


def _judged_by_commit(plan: Plan, ref: str, both: Versions, outside: Sequence[str], measured: SideBySide) -> str:
    """Return the conditions of the comparison, in sentences."""
    sentences = [f"Judged by {ref}, measured side by side with {both.new.name}."]
    if outside:
        sentences.append(f"The code of {', '.join(outside)} is not in this repository: both sides ran the same.")
    if not both.together:
        sentences.append(
            "The models of both do not fit into memory together: they were loaded in turn, block by block."
        )
    if changed := dependencies(plan.root, ref):
        sentences.append(f"{ref} pins other packages ({', '.join(changed)}): both ran with the installed ones.")
    return " ".join(sentences)


def _title(plan: Plan, pair: str, device: object, backend: str, prompts: Sized) -> str:
    where = f"{type_of(plan.identity)} on {device}{f', backend {backend}' if backend else ''}"
    return f"{pair}, {where}, {len(prompts)} prompts x {plan.preset.max_new_tokens} tokens"
