"""From options to a plan: each file, and the hardware, is asked once, before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdecode.backends import check as check_backend
from specdecode.bench.arms.callables import ModelNames
from specdecode.bench.arms.entry import drafter_kinds
from specdecode.bench.gate.baselines import TOLERANCE, find
from specdecode.bench.gate.verdicts import AGAINST_TOLERANCE, tolerance_of
from specdecode.bench.options import Options, again_of
from specdecode.bench.presets import Preset, arms_at, preset
from specdecode.bench.runs.file import read
from specdecode.bench.runs.names import BASELINE, FLAGS, OWN_TYPE, shared_by
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.heads.loading import shipped_head
from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT
from specdecode.models.lm import LM
from specdecode.models.loading import TINY, choose_device, choose_dtype, load
from specdecode.models.tensor_parallel import split_count
from specdecode.support.environment import hardware
from specdecode.support.git import commit_id
from specdecode.support.torchrun import rank

BUDGET_MINUTES = 30.0
"""How long `--until` may take, where nobody says."""

_DRAFTS = {EMBEDDED: EMBEDDED_DRAFT, TINY: "layers:0-1"}
"""The drafts of targets that have one of their own."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Which models a session runs, and where: what the speed suite and the quality suite share.

    Attributes:
        identity: names of the hardware, the models, the type of their weights and the preset.
        device: of all models.
        backend: of our own forwards, by its name on the command line.
        tp: "auto" if the processes of torchrun share the target's weights.
    """

    identity: Identity
    device: torch.device
    backend: str
    tp: str | None = None

    def load_target(self) -> LM:
        """Load the target on the backend "eager"."""
        how: dict[str, Any] = {"device": self.device, "dtype": self.identity.dtype, "backend": "eager"}
        return load(self.identity.target, **how, tp=self.tp)

    @property
    def names(self) -> ModelNames:
        """The models, the device and the type by name."""
        return ModelNames(self.identity.target, self.identity.draft, str(self.device), self.identity.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """One session of `pytest --benchmark`, resolved.

    Attributes:
        root: folder of the repository.
        setup: the models and the device.
        preset: arms, prompts and lengths, with what the command line says otherwise.
        eos: whether outputs end at the target's stop tokens.
        resume: whether to go on with the blocks that an interrupted run finished.
        against: the commit that the working tree is measured against, if there is one.
        baseline: the run to judge by; None with `against`, and where there is none for these models.
        compared_arms: the arms that the baseline or the other commit has.
        baselines: folder of the baselines; below `root` if it is relative.
        tolerance: share by which a time may be worse.
        tolerances: the same by arm, where it is another.
        gate: which verdicts fail the session: a key of `gate.verdicts.FAILING`.
        until: the slowdown, as a share, that each verdict is to see; None for a fixed number of repeats.
        budget_minutes: how long that may take.
        again: the most time spent on measuring again what other work disturbed, as a share of the rest.
    """

    root: Path
    setup: Setup
    preset: Preset
    eos: bool
    resume: bool
    against: str | None
    baseline: RunFile | None
    compared_arms: list[str]
    baselines: Path
    tolerance: float
    tolerances: Mapping[str, float]
    gate: str
    until: float | None = None
    budget_minutes: float = BUDGET_MINUTES
    again: float = 1.0

    @property
    def identity(self) -> Identity:
        """What makes runs comparable."""
        return self.setup.identity

    @property
    def judged_arms(self) -> list[str]:
        """The preset's arms, and those that it is compared with: one that the run lacks must not pass in silence."""
        return list(dict.fromkeys([*self.preset.arms, *self.compared_arms]))

    @property
    def journal(self) -> Path:
        """Where finished blocks are kept until the run is complete."""
        # Of processes that decode together each has its own; the first one's is the one to resume.
        process = f".{rank()}" if self.setup.tp and rank() else ""
        return self.root / "results" / f"{self.identity.hardware}-{self.identity.file.stem}{process}.blocks.jsonl"

    def entries(self, selected: Collection[str]) -> dict[str, dict[str, Any]]:
        """The preset's entries of the selected arms, and of the arms that they are compared with."""
        compared_with = {self.preset.baseline_of(arm) for arm in selected if arm in self.preset.arms}
        wanted = {self.preset.baseline, *compared_with, *selected}
        return {arm: entry for arm, entry in self.preset.arms.items() if arm in wanted}


def resolve_setup(options: Options) -> Setup:
    """Resolve which models run, and where.

    Raises:
        ValueError: a device, a type or a backend that cannot be used.
    """
    count = split_count(options.tp, options.target, None, options.backend)
    device = choose_device(options.device)
    check_backend(options.backend, device)
    target = TINY if options.tiny and options.target == EMBEDDED else options.target
    identity = Identity(
        hardware=shared_by(count, hardware(device)),
        target=target,
        draft=options.draft or _DRAFTS.get(target, ""),
        dtype=str(choose_dtype(options.dtype, device)).removeprefix("torch."),
        preset=".".join([Path(options.preset).stem, *(flag for flag in FLAGS if getattr(options, flag))]),
    )
    return Setup(identity, device, options.backend, options.tp)


def resolve(options: Options, setup: Setup | None = None, *, judged: bool = True) -> Plan:
    """Resolve the options of a speed session.

    Args:
        options: the command line.
        setup: its models and device, if they are resolved already.
        judged: look for a baseline, or for the arms of the other commit. Nothing judges a run that only recommends, and
            its arms are all compared with plain decoding.

    Raises:
        ValueError: options that are wrong or do not go together, or a file that cannot be read.
    """
    chosen = preset(options.preset)
    if not judged:
        chosen = replace(chosen, arms={BASELINE: {}} | chosen.arms, baseline=BASELINE)
    setup = setup or resolve_setup(options)
    if all("server" in entry for entry in chosen.arms.values()):
        # What a server drafts with, and in which type it computes, its command says.
        identity = setup.identity
        draft, dtype = options.draft and identity.draft, options.dtype and identity.dtype
        setup = replace(setup, identity=replace(identity, draft=draft or "", dtype=dtype or OWN_TYPE))
    if options.against is not None:
        _check_against(options)
    old = _baseline(options, setup.identity) if judged and options.against is None else None
    compared = list(old.arms) if old else []
    if judged and options.against is not None:
        compared = arms_at(options.root, options.against, options.preset)
    return Plan(
        root=options.root,
        setup=setup,
        preset=_with_options(chosen, options, setup.identity.target),
        eos=options.eos,
        resume=options.resume,
        against=options.against,
        baseline=old,
        compared_arms=compared,
        baselines=Path(options.baselines),
        tolerances=options.tolerances,
        tolerance=tolerance_of(options.tolerance, TOLERANCE if options.against is None else AGAINST_TOLERANCE),
        gate=options.gate,
        until=options.until,
        budget_minutes=_budget_minutes(options),
        again=again_of(options),
    )


def _budget_minutes(options: Options) -> float:
    """How long `--until` may take."""
    if options.budget_minutes is None:
        return BUDGET_MINUTES
    if options.until is None:
        raise ValueError("--budget-minutes says how long --until may take: give --until, too")
    if not options.budget_minutes > 0:
        raise ValueError(f"the budget is {options.budget_minutes} minutes: give it some time")
    return options.budget_minutes


def _with_options(chosen: Preset, options: Options, target: str) -> Preset:
    """The preset with what the command line says otherwise, and without heads that the target does not have."""
    if options.repeats is not None and options.repeats < 1:
        raise ValueError(f"repeats is {options.repeats}: each prompt is measured once at least")
    if options.tiny:
        chosen = chosen.tiny()
    length = chosen.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    # A head is trained for one target: another one is measured without, unless the preset names its file.
    headless = shipped_head(target) is None and not target.startswith("shape:")
    chosen = replace(
        chosen,
        arms={arm: entry for arm, entry in chosen.arms.items() if not (headless and _needs_shipped_head(entry))},
        prompts=options.prompts or chosen.prompts,
        max_new_tokens=length,
        repeats=chosen.repeats if options.repeats is None else options.repeats,
        lengths=[shorter for shorter in chosen.lengths if shorter < length],
    )
    chosen.check_baselines()
    return chosen


def _needs_shipped_head(entry: dict[str, Any]) -> bool:
    return "head" in drafter_kinds(entry) and "head" not in entry


def _check_against(options: Options) -> None:
    for option, value, why in (
        ("--baseline", options.baseline, "it measures both versions anew"),
        ("--resume", options.resume, "it measures both versions anew"),
        ("--eos", options.eos, "outputs of one length are compared"),
        ("--tp", options.tp, "both versions are measured by processes of their own"),
    ):
        if value:
            raise ValueError(f"{option} does not go with --against: {why}")
    try:
        commit_id(str(options.against), options.root)
    except ValueError as error:
        raise ValueError(f"--against {error}") from None


def _baseline(options: Options, identity: Identity) -> RunFile | None:
    if options.baseline:
        return read(Path(options.baseline))
    return find(identity, options.root / options.baselines)
