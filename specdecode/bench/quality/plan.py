"""From options to the plan of a quality session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from specdecode.bench.options import Options
from specdecode.bench.plan import Setup, resolve_setup
from specdecode.bench.runs.names import margins_file
from specdecode.evals.margins import read_margins
from specdecode.evals.quality_arms import QualityPreset, quality_preset
from specdecode.support.files import slug


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """One session of `pytest --quality`, resolved.

    Attributes:
        root: folder of the repository.
        setup: the models and the device.
        preset: arms, texts and tasks, with what the command line says otherwise.
        resume: whether to go on with the pieces that an interrupted run finished.
        margins_path: where the margins are, or would be.
        margins: by arm and measure; see `evals.margins.check_margins`.
    """

    root: Path
    setup: Setup
    preset: QualityPreset
    resume: bool
    margins_path: Path
    margins: Mapping[str, Mapping[str, float]]

    @property
    def file(self) -> Path:
        """Where the run is kept."""
        identity = self.setup.identity
        return self.root / "results" / f"quality-{slug(identity.target)}-{identity.dtype}-{identity.preset}.json"

    @property
    def journal(self) -> Path:
        """Where finished pieces are kept until the run is complete."""
        return self.file.with_suffix(".jsonl")


def resolve_quality(options: Options, setup: Setup | None = None) -> QualityPlan:
    """Resolve the options of a quality session.

    Args:
        options: the command line.
        setup: its models and device, if they are resolved already.

    Raises:
        ValueError: an option is wrong, or a file cannot be read.
    """
    if options.tp is not None:
        raise ValueError("--tp does not go with --quality: it is measured in one process")
    preset = quality_preset("tiny" if options.tiny else options.preset)
    tasks = preset.tasks
    if tasks is not None and options.max_new_tokens is not None:
        tasks = replace(tasks, max_new_tokens=options.max_new_tokens)
    preset = replace(preset, texts=options.prompts or preset.texts, tasks=tasks)
    setup = setup or resolve_setup(options)
    margins = options.root / options.baselines / margins_file(setup.identity.target, preset.texts)
    return QualityPlan(options.root, setup, preset, options.resume, margins, read_margins(margins))
