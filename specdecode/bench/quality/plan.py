"""The plan of a quality session, made from options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from specdecode.bench.options import Options
from specdecode.bench.plan import Setup, resolve_setup
from specdecode.bench.runs.names import margins_file
from specdecode.evals.margins import read_margins
from specdecode.evals.quality_presets import QualityPreset, quality_preset
from specdecode.support.files import fitting, slug


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """The resolved plan of one session of `pytest --quality`.

    Attributes:
        root: folder of the repository.
        setup: the models and the device.
        preset: arms, texts and tasks, as changed by the command line.
        resume: whether to continue an interrupted run from its finished pieces.
        margins_path: path of the margins; the file may not exist.
        margins: margins by arm and measure; see `evals.margins.check_margins`.
    """

    root: Path
    setup: Setup
    preset: QualityPreset
    resume: bool
    margins_path: Path
    margins: Mapping[str, Mapping[str, float]]

    @property
    def file(self) -> Path:
        """The path of the run's file."""
        identity = self.setup.identity
        name = f"quality-{slug(identity.target)}-{identity.dtype}-{identity.preset}.json"
        return self.root / "results" / fitting(name)

    @property
    def journal(self) -> Path:
        """The path of the finished pieces, until the run is complete."""
        return self.file.with_suffix(".jsonl")


def resolve_quality(options: Options, setup: Setup | None = None) -> QualityPlan:
    """Resolve the options of a quality session.

    Args:
        options: options of the command line.
        setup: models and device, if already resolved.

    Raises:
        ValueError: an option is wrong, or a file cannot be read.
    """
    if options.tp is not None:
        raise ValueError("--tp does not go with --quality: quality is measured in one process")
    if options.draft_device is not None:
        raise ValueError("--draft-device does not go with --quality: quality is measured without a draft")
    preset = quality_preset("tiny" if options.tiny else options.preset)
    tasks = preset.tasks
    if tasks is not None and options.max_new_tokens is not None:
        tasks = replace(tasks, max_new_tokens=options.max_new_tokens)
    preset = replace(preset, texts=options.prompts or preset.texts, tasks=tasks)
    setup = setup or resolve_setup(options)
    margins = options.root / options.baselines / margins_file(setup.identity.target, preset.texts)
    return QualityPlan(options.root, setup, preset, options.resume, margins, read_margins(margins))
