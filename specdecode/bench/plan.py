"""The plan of a speed session, made from options. Files and the hardware are read once, before a model is loaded."""

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
from specdecode.bench.options import Options
from specdecode.bench.presets import Preset, arms_at, preset
from specdecode.bench.runs.file import read
from specdecode.bench.runs.names import BASELINE, FLAGS, OWN_TYPE, hardware_name
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.heads.loading import shipped_head
from specdecode.models.devices import choose_device, input_device
from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT
from specdecode.models.lm import LM
from specdecode.models.loading import TINY, choose_dtype, dtype_name, load
from specdecode.models.tensor_parallel import split_count
from specdecode.support.environment import hardware
from specdecode.support.files import fitting, slug
from specdecode.support.git import commit_id
from specdecode.support.torchrun import rank

BUDGET_MINUTES = 30.0
"""Default time budget of `--until`, in minutes."""

_SHARE_OF_UNTIL = 0.4
"""With `--until`, the largest default tolerance, as a share of the slowdown to detect: 2 % for 5 %."""

_DRAFTS = {EMBEDDED: EMBEDDED_DRAFT, TINY: "layers:0-1"}
"""Default drafts of some targets."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The models and the device of a session, for the speed suite and the quality suite.

    Attributes:
        identity: names of the hardware, the models, the type of their weights and the preset.
        device: device of all models; that of the inputs, if the target's layers are on several.
        backend: backend of our arms, by its name on the command line.
        tp: "auto" if the processes of torchrun share the target's weights.
        devices: number of GPUs over which the target's layers are spread; 1 if they are on one device.
        draft_device: device of the draft; None for the target's.
    """

    identity: Identity
    device: torch.device
    backend: str
    tp: str | None = None
    devices: int = 1
    draft_device: torch.device | None = None

    @property
    def device_map(self) -> str | None:
        """The argument of `load` for the target."""
        return "auto" if self.devices > 1 else None

    @property
    def sharing(self) -> dict[str, Any]:
        """How several devices share the models, as arguments of `load_models`."""
        return {"tp": self.tp, "device_map": self.device_map, "draft_device": self.draft_device}

    def load_target(self) -> LM:
        """Load the target on the backend "eager"."""
        how: dict[str, Any] = {"dtype": self.identity.dtype, "backend": "eager"}
        device = None if self.device_map else self.device
        return load(self.identity.target, **how, device=device, tp=self.tp, device_map=self.device_map)

    @property
    def names(self) -> ModelNames:
        """The models, the device and the type by name."""
        return ModelNames(self.identity.target, self.identity.draft, str(self.device), self.identity.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved plan of one session of `pytest --benchmark`.

    Attributes:
        root: folder of the repository.
        setup: the models and the device.
        preset: arms, prompts and lengths, as changed by the command line.
        eos: whether outputs end at the target's stop tokens.
        resume: whether to continue an interrupted run from its finished blocks.
        against: the commit to measure the working tree against; None to judge by a baseline.
        baseline: the run to judge by; None with `against`, and if there is no baseline for these models.
        compared_arms: the arms of the baseline or of the other commit.
        baselines: folder of the baselines; a relative path is relative to `root`.
        tolerance: share by which a time may be worse.
        tolerances: tolerances of single arms, by name, in place of `tolerance`.
        gate: the setting that decides which verdicts fail the session: a key of `gate.verdicts.FAILING`.
        until: the slowdown, as a share, that each verdict must detect; None for a fixed number of repeats.
        budget_minutes: time budget of `until`.
        again: the most time for measuring disturbed runs again, as a share of the rest.
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
        """Names of the hardware, the models, their type and the preset. Runs of equal identity can be compared."""
        return self.setup.identity

    @property
    def judged_arms(self) -> list[str]:
        """The preset's arms and the compared arms, so that an arm that the run lacks is reported as missing."""
        return list(dict.fromkeys([*self.preset.arms, *self.compared_arms]))

    @property
    def journal(self) -> Path:
        """The path of the journal of finished blocks, until the run is complete."""
        # Each of several processes that decode together has its own journal. A run resumes from the first one's.
        process = f".{rank()}" if self.setup.tp and rank() else ""
        name = f"{self.identity.hardware}-{self.identity.file.stem}{process}.blocks.jsonl"
        return self.root / "results" / fitting(name)

    def entries(self, selected: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return the preset's entries of the selected arms and of their reference arms."""
        compared_with = {self.preset.baseline_of(arm) for arm in selected if arm in self.preset.arms}
        wanted = {self.preset.baseline, *compared_with, *selected}
        return {arm: entry for arm, entry in self.preset.arms.items() if arm in wanted}


def resolve_setup(options: Options) -> Setup:
    """Return the models and the device that the options name.

    Raises:
        ValueError: a device, the type or the backend cannot be used, or options exclude each other.
    """
    count = split_count(options.tp, options.target, None, options.backend)
    target = TINY if options.tiny and options.target == EMBEDDED else options.target
    draft = options.draft or _DRAFTS.get(target, "")
    device = input_device(options.device, options.device_map, target, options.tp, options.backend)
    check_backend(options.backend, device)
    devices, draft_device = _devices(options.device_map), _draft_device(options, draft, device)
    identity = Identity(
        hardware=hardware_name(hardware(device), count, devices, str(draft_device or "")),
        target=target,
        draft=draft,
        dtype=dtype_name(choose_dtype(options.dtype, device)),
        preset=".".join([slug(Path(options.preset).stem), *(flag for flag in FLAGS if getattr(options, flag))]),
    )
    return Setup(identity, device, options.backend, options.tp, devices, draft_device)


def _devices(device_map: str | None) -> int:
    """Return the number of devices over which the target's layers are spread."""
    if device_map is None:
        return 1
    if (gpus := torch.cuda.device_count()) < 2:
        raise ValueError(
            f"--device-map {device_map} spreads layers over several GPUs, and there are {gpus}: leave it out"
        )
    return gpus


def _draft_device(options: Options, draft: str, device: torch.device) -> torch.device | None:
    """Return the device of the draft, or None if it is the target's."""
    if options.draft_device is None:
        return None
    if not draft:
        raise ValueError("--draft-device is for a draft model: name it with --draft")
    if draft.startswith("layers:"):
        raise ValueError(f"{draft!r} shares the weights of its target, wherever they are: leave out --draft-device")
    if options.tp is not None:
        raise ValueError("--draft-device does not go with --tp, where each process has its own draft beside its target")
    chosen = choose_device(options.draft_device)
    check_backend(options.backend, chosen)
    same = (chosen.type, chosen.index or 0) == (device.type, device.index or 0)
    return None if same else chosen


def resolve(options: Options, setup: Setup | None = None, *, judged: bool = True) -> Plan:
    """Return the plan of a speed session.

    Args:
        options: options of the command line.
        setup: models and device, if already resolved.
        judged: whether to read a baseline, or the arms of the other commit. False for a run that only recommends: it is
            not judged, and its arms are compared with plain decoding unless their entries name another arm.

    Raises:
        ValueError: options are wrong or exclude each other, or a file cannot be read.
    """
    chosen = preset(options.preset)
    if not judged:
        chosen = replace(chosen, arms={BASELINE: {}} | chosen.arms, baseline=BASELINE)
    setup = setup or resolve_setup(options)
    if all("server" in entry for entry in chosen.arms.values()):
        # The command of a server chooses its draft and its type, unless options name them.
        identity = setup.identity
        draft, dtype = options.draft and identity.draft, options.dtype and identity.dtype
        setup = replace(setup, identity=replace(identity, draft=draft or "", dtype=dtype or OWN_TYPE))
    if options.against is not None:
        _check_against(options)
    old = _baseline(options, setup.identity) if judged and options.against is None else None
    compared = list(old.arms) if old else []
    if judged and options.against is not None:
        theirs = arms_at(options.root, options.against, options.preset)
        compared = [arm for arm, entry in theirs.items() if _has_head(entry, setup.identity.target)]
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
        tolerance=_tolerance(options),
        gate=options.gate,
        until=options.until,
        budget_minutes=_budget_minutes(options),
        again=options.again,
    )


def _tolerance(options: Options) -> float:
    """Return the share by which a time may be worse. A verdict detects only larger slowdowns than this tolerance, so
    `--until` sets a smaller default."""
    default = TOLERANCE if options.against is None else AGAINST_TOLERANCE
    if options.until is None:
        return tolerance_of(options.tolerance, default)
    tolerance = tolerance_of(options.tolerance, min(default, _SHARE_OF_UNTIL * options.until))
    if tolerance >= options.until:
        raise ValueError(
            f"--until {options.until:.3g} asks for verdicts that detect a slowdown of {options.until:.1%}, but the"
            f" tolerance of {tolerance:.1%} allows it: give a larger --until or a smaller --tolerance"
        )
    return tolerance


def _budget_minutes(options: Options) -> float:
    """Return the time budget of `--until`, in minutes."""
    if options.budget_minutes is None:
        return BUDGET_MINUTES
    if options.until is None:
        raise ValueError("--budget-minutes limits the time of --until: give --until, too")
    if not options.budget_minutes > 0:
        raise ValueError(f"the budget is {options.budget_minutes} minutes: give more than 0")
    return options.budget_minutes


def _with_options(chosen: Preset, options: Options, target: str) -> Preset:
    """Return the preset as changed by the command line, without arms of heads that the target does not have."""
    if options.tiny:
        chosen = chosen.tiny()
    length = chosen.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    chosen = replace(
        chosen,
        arms={arm: entry for arm, entry in chosen.arms.items() if _has_head(entry, target)},
        prompts=options.prompts or chosen.prompts,
        max_new_tokens=length,
        repeats=chosen.repeats if options.repeats is None else options.repeats,
        lengths=[shorter for shorter in chosen.lengths if shorter < length],
    )
    chosen.check_baselines()
    return chosen


def _has_head(entry: Mapping[str, Any], target: str) -> bool:
    """Return whether there is a head for the arm, if it needs one.

    A shipped head is trained for one target. Other targets lack such an arm, unless the preset names a head.
    """
    needs_shipped = "head" in drafter_kinds(entry) and "head" not in entry
    return not needs_shipped or shipped_head(target) is not None or target.startswith("shape:")


def _check_against(options: Options) -> None:
    for option, value, why in (
        ("--baseline", options.baseline, "measures both versions anew"),
        ("--resume", options.resume, "measures both versions anew"),
        ("--eos", options.eos, "compares outputs of one length"),
        ("--tp", options.tp, "measures each version in one process"),
        ("--device-map", options.device_map, "measures each version on one device"),
        ("--draft-device", options.draft_device, "measures each version on one device"),
    ):
        if value:
            raise ValueError(f"{option} does not go with --against, which {why}: leave one of them out")
    try:
        commit_id(str(options.against), options.root)
    except ValueError as error:
        raise ValueError(f"--against {error}") from None


def _baseline(options: Options, identity: Identity) -> RunFile | None:
    if options.baseline:
        return read(Path(options.baseline))
    return find(identity, options.root / options.baselines)
