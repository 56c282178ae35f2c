"""One session of `pytest --benchmark`: from its options to what was measured, and what the gate says of it."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from specdecode.bench.arms import make
from specdecode.bench.baselines import TOLERANCE, find, read
from specdecode.bench.environment import conditions, environment, hardware, roofline
from specdecode.bench.gate import Judgement, judge
from specdecode.bench.journal import code, open_journal
from specdecode.bench.measure import experiment
from specdecode.bench.names import BASELINE
from specdecode.bench.presets import Preset, preset
from specdecode.bench.progress import progress
from specdecode.bench.runs import Header, Identity, RunFile
from specdecode.evals.data import token_prompts
from specdecode.lm import LM
from specdecode.loading import EMBEDDED, EMBEDDED_DRAFT, choose_device, choose_dtype, load, weights_of


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's, as `pytest --help` tells them; None where the preset or the hardware decides."""

    root: Path
    preset: str
    target: str
    draft: str | None
    device: str | None
    dtype: str | None
    max_new_tokens: int | None
    prompts: str | None
    repeats: int | None
    resume: bool
    tolerance: float | None
    baseline: str | None

    @property
    def identity(self) -> Identity:
        """What makes runs comparable; known before a model is loaded."""
        device = choose_device(self.device)
        return Identity(
            hardware=hardware(device),
            target=self.target,
            draft=self.draft or (EMBEDDED_DRAFT if self.target == EMBEDDED else ""),
            dtype=str(choose_dtype(self.dtype, device)).removeprefix("torch."),
            preset=Path(self.preset).stem,
        )

    @property
    def experiment(self) -> Preset:
        """The preset, with what the command line says otherwise."""
        chosen = preset(self.preset)
        return Preset(
            arms=chosen.arms,
            prompts=self.prompts or chosen.prompts,
            max_new_tokens=chosen.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            repeats=chosen.repeats if self.repeats is None else self.repeats,
        )

    @property
    def journal(self) -> Path:
        """Where finished blocks are kept until the run is complete."""
        identity = self.identity
        return self.root / "results" / f"{identity.hardware}-{identity.file.stem}.blocks.jsonl"

    def load(self, name: str, target: LM | None = None) -> LM:
        """A model on the chosen device, in the chosen type."""
        return load(name, device=self.device, dtype=self.dtype, target=target)


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


def baseline(options: Options) -> RunFile | None:
    """The baseline to judge by, if there is one."""
    if options.baseline:
        return read(Path(options.baseline))
    return find(options.identity, options.root / "baselines")


def measure(options: Options, selected: set[str]) -> Bench:
    """Measure the selected arms of the preset, and judge them by the baseline.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model cannot be had or a file cannot be judged.
    """
    identity, chosen = options.identity, options.experiment
    old = baseline(options)
    target = options.load(identity.target)
    draft = options.load(identity.draft, target) if identity.draft else None
    prompts, origins = token_prompts(chosen.prompts, target.encode)
    entries = {name: entry for name, entry in chosen.arms.items() if name in {BASELINE, *selected}}
    arms = [make(name, entry, target, draft) for name, entry in entries.items()]
    versions = {**environment(), "weights": weights_of(identity.target)}
    what = {
        "identity": identity.file.as_posix(),
        "prompts": prompts,
        "max_new_tokens": chosen.max_new_tokens,
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
            target, arms, prompts, chosen.max_new_tokens, chosen.repeats, progress=tell, finished=finished, keep=keep
        )
    around = {"before": before, "after": conditions(target.device)}
    header = Header(
        identity, chosen.max_new_tokens, results.outputs(), results.floor, roofline(target), versions, around
    )
    run = RunFile(Path(), header, results.records())
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    # Of the preset's arms only those that were selected; what the preset no longer has is missing all the same.
    concerned = {arm for arm in old.arms if arm not in chosen.arms} | set(entries) if old else set()
    return Bench(
        title=_title(target, draft, identity, chosen, prompts),
        origins=origins,
        run=run,
        durations={arm: results.durations(arm) for arm in run.arms},
        wrong={arm: results.wrong(arm) for arm in run.arms},
        judged_by=_judged_by(old, options, identity),
        judgements=judge(run, old, tolerance, concerned) if old else [],
    )


def _title(target: LM, draft: LM | None, identity: Identity, chosen: Preset, prompts: Sized) -> str:
    pair = f"{target.name}{f' with {draft.name}' if draft else ''}"
    return f"{pair}, {identity.dtype} on {target.device}, {len(prompts)} prompts x {chosen.max_new_tokens} tokens"


def _judged_by(old: RunFile | None, options: Options, identity: Identity) -> str:
    own = options.root / "baselines" / identity.file
    if old is None:
        return f"No baseline for this hardware: baselines/{identity.file} is not there, so nothing was gated."
    told = f"Gate: against {old.path}."
    if old.header.identity.hardware != identity.hardware:
        told += f" It is another machine's ({own} is not there): counters are gated, times are not."
    different = [
        f"{name} {theirs} -> {ours}"
        for name, ours in environment().items()
        if (theirs := old.header.versions.get(name, ours)) != ours
    ]
    return told + (f" What is not as it was: {', '.join(different)}." if different else "")
