"""One session of `pytest --benchmark`: from its options to what was measured, and what the gate says of it."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specdecode.bench.arms.arm import make
from specdecode.bench.gate.baselines import TOLERANCE
from specdecode.bench.gate.verdicts import AGAINST_TOLERANCE, Judgement, Verdict, judge, tolerance_of
from specdecode.bench.measure.bandwidth import roofline
from specdecode.bench.measure.experiment import experiment
from specdecode.bench.measure.journal import code, open_journal
from specdecode.bench.measure.side_by_side import Worker, dependencies, measure_side_by_side, versions
from specdecode.bench.options import Options, baseline
from specdecode.bench.presets import Preset
from specdecode.bench.report.captions import judged_by
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Header, Identity, RunFile
from specdecode.evals.data import token_prompts
from specdecode.models.embedded import weights_of
from specdecode.models.loading import choose_device
from specdecode.support.environment import conditions, environment
from specdecode.support.progress import progress


@dataclass(frozen=True, slots=True)
class Bench:
    """What a session measured.

    Attributes:
        title: names the models and the size of the experiment.
        origins: of the prompts.
        run: as it is kept and compared.
        durations: seconds of each run, by arm.
        wrong: prompts on which an arm gave other tokens than autoregressive decoding, by arm.
        judged_by: what the gate compared with, in words.
        judgements: its verdicts.
    """

    title: str
    origins: list[str]
    run: RunFile
    durations: dict[str, list[float]]
    wrong: dict[str, list[str]]
    judged_by: str
    judgements: list[Judgement]


def measure(options: Options, selected: set[str]) -> Bench:
    """Measure the selected arms of the preset, and judge them by the baseline or by another commit.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model cannot be had or a file cannot be judged.
    """
    if options.against is not None:
        return _measure_against(options, options.against, selected)
    identity, chosen = options.identity, options.experiment
    tolerance = tolerance_of(options.tolerance, TOLERANCE)
    old = baseline(options)
    target, draft = options.models()
    prompts, origins = token_prompts(chosen.prompts, target)
    entries = {name: entry for name, entry in chosen.arms.items() if name in {BASELINE, *selected}}
    backend = target.with_backend(options.backend).backend
    stops = target.stop_token_ids if options.eos else ()
    if options.eos and not stops:
        raise ValueError(f"{identity.target} has no stop tokens: leave out --eos")
    arms = [make(name, entry, target, draft, options.backend, chosen.lengths, stops) for name, entry in entries.items()]
    versions = {**environment(), "weights": weights_of(identity.target), "backend": backend.name}
    what = {
        "identity": identity.file.as_posix(),
        "prompts": prompts,
        "max_new_tokens": chosen.max_new_tokens,
        "lengths": chosen.lengths,
        "stop_token_ids": stops,
        "arms": entries,
        "code": code(),
        "versions": versions,
    }
    finished, keep = open_journal(options.journal, what, options.resume)
    before = conditions(target.device)
    with progress() as tell:
        if options.resume:
            tell(0, 1, f"resuming: {len(finished)} of {len(prompts) * chosen.repeats} blocks are there")
        results = experiment(
            arms, prompts, chosen.max_new_tokens, chosen.repeats, progress=tell, finished=finished, keep=keep
        )
    around = {"before": before, "after": conditions(target.device)}
    header = Header(
        identity, chosen.max_new_tokens, results.outputs(), results.floor, roofline(target), versions, around
    )
    run = RunFile(Path(), header, results.records())
    # Of the preset's arms only those that were selected; what the preset no longer has is missing all the same.
    concerned = {arm for arm in old.arms if arm not in chosen.arms} | set(entries) if old else set()
    return Bench(
        title=_title(
            f"{target.name}{f' with {draft.name}' if draft else ''}",
            str(target.device),
            str(backend),
            identity,
            chosen,
            prompts,
        ),
        origins=origins,
        run=run,
        durations={arm: results.durations(arm) for arm in run.arms},
        wrong={arm: results.wrong(arm) for arm in run.arms},
        judged_by=judged_by(run, old, Path("baselines") / identity.file),
        judgements=judge(run, old, tolerance, concerned) if old else [],
    )


def _measure_against(options: Options, ref: str, selected: set[str]) -> Bench:
    """The same of two versions, side by side."""
    for other, given, why in (
        ("--baseline", options.baseline, "it measures both versions anew"),
        ("--resume", options.resume, "it measures both versions anew"),
        ("--eos", options.eos, "outputs of one length are compared"),
    ):
        if given:
            raise ValueError(f"{other} does not go with --against: {why}")
    tolerance = tolerance_of(options.tolerance, AGAINST_TOLERANCE)
    identity, chosen = options.identity, options.experiment
    entries = {name: entry for name, entry in chosen.arms.items() if name in {BASELINE, *selected}}
    models = {
        "target": identity.target,
        "draft": identity.draft,
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
    }
    device = choose_device(options.device)
    before = conditions(device)
    with versions(options.root, ref, {**models, "arms": entries}) as both:
        new, old = both.new, both.old
        if refused := new.about["refused"]:
            raise ValueError(next(iter(refused.values())))
        refused = old.about["refused"]
        if BASELINE in refused:
            raise ValueError(f"{ref} cannot be compared: {refused[BASELINE]}")
        arms = [arm for arm in entries if arm not in refused]
        both.use(new)
        prompts, origins = new.ask("prompts", spec=chosen.prompts)
        bandwidth = new.ask("roofline")
        with progress() as tell:
            measured = measure_side_by_side(both, arms, prompts, chosen.max_new_tokens, chosen.repeats, progress=tell)
    around = {"before": before, "after": conditions(device)}

    def run(version: Literal["new", "old"], worker: Worker) -> RunFile:
        outputs = measured.outputs(version)
        header = Header(
            identity,
            chosen.max_new_tokens,
            outputs,
            measured.floor(),
            bandwidth,
            worker.about["versions"],
            around,
        )
        records = {arm: measured.record(version, worker.name, arm, worker.about["about"][arm]) for arm in arms}
        return RunFile(Path(), header, records)

    mine, theirs = run("new", new), run("old", old)
    # An arm that the working tree's preset no longer has must not pass in silence.
    theirs.arms.update({arm: ArmRecord({}) for arm in options.known_arms if arm not in chosen.arms})
    judgements = judge(mine, theirs, tolerance, side_by_side=measured.change)
    for arm, reason in refused.items():
        why = f"{ref} cannot make this arm: {reason}"
        judgements += [Judgement(arm, gate, Verdict.NO_BASELINE, why) for gate in ("time", "counters")]
    told = f"Judged by {ref}, measured side by side with the working tree."
    if not both.together:
        told += " The models of both do not fit into memory together: they were loaded in turn, block by block."
    if changed := dependencies(options.root, ref):
        told += f" {ref} pins other packages ({', '.join(changed)}): both ran with those that are installed."
    return Bench(
        title=_title(new.about["pair"], new.about["device"], new.about["backend"], identity, chosen, prompts),
        origins=origins,
        run=mine,
        durations={arm: [of.total_s for block in measured.blocks for of in block[arm].new.runs] for arm in arms},
        wrong={arm: [block[arm].prompt for block in measured.blocks if "bug" in block[arm].new.checks] for arm in arms},
        judged_by=told,
        judgements=judgements,
    )


def _title(pair: str, device: str, backend: str, identity: Identity, chosen: Preset, prompts: Sized) -> str:
    where = f"{identity.dtype} on {device}, backend {backend}"
    return f"{pair}, {where}, {len(prompts)} prompts x {chosen.max_new_tokens} tokens"
