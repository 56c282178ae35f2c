"""One session of `pytest --quality`: from its options to what was judged, piece by piece, and what the margins say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from specdecode.backends import check as check_backend
from specdecode.bench.measure.journal import code, open_lines
from specdecode.bench.options import Options
from specdecode.bench.runs.names import margins_file
from specdecode.evals.answers import Problem, answer, problems
from specdecode.evals.arms import QualityPreset, make, quality_preset
from specdecode.evals.data import NotAtHandError, documents, token_prompts
from specdecode.evals.needle import bury, look_for
from specdecode.evals.perplexity import DecodePath, Judged
from specdecode.evals.perplexity import judge as read_side_by_side
from specdecode.evals.results import (
    REFERENCE,
    Answer,
    Judgement,
    QualityRun,
    Sought,
    document,
    judge,
    read_margins,
    write,
)
from specdecode.models.embedded import weights_of
from specdecode.models.lm import LM
from specdecode.models.loading import choose_device
from specdecode.support.environment import environment
from specdecode.support.files import slug, write_whole
from specdecode.support.progress import progress

# What is written of a figure: more than any interval is wide, and few enough to keep a run's file small.
_DIGITS = 7


@dataclass(frozen=True, slots=True)
class Quality:
    """What a session judged.

    Attributes:
        run: as it is kept.
        file: where it is.
        margins: where its margins are, or would be.
        judgements: of every arm and measure.
    """

    run: QualityRun
    file: Path
    margins: Path
    judgements: list[Judgement]


def chosen_preset(options: Options) -> QualityPreset:
    """The preset, or the one to rehearse with; and the texts and the length of answers of the command line, if it says
    any."""
    preset = quality_preset("tiny" if options.tiny else options.preset)
    tasks = preset.tasks
    if tasks is not None and options.max_new_tokens is not None:
        tasks = replace(tasks, max_new_tokens=options.max_new_tokens)
    return replace(preset, texts=options.prompts or preset.texts, tasks=tasks)


def measure(options: Options, selected: Collection[str]) -> Quality:
    """Judge the selected arms of the preset, and what these refer to.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model or a text cannot be had, or a file cannot be read.
    """
    preset = chosen_preset(options)
    identity = options.identity
    margins = options.root / "baselines" / margins_file(identity.target, preset.texts)
    limits = read_margins(margins)
    check_backend(options.backend, choose_device(options.device))
    target = options.load(identity.target)
    texts, origins = token_prompts(preset.texts, target)
    arms = {name: entry for name, entry in preset.arms.items() if name in selected}
    reference = make("reference", {}, target, preset.k, options.backend)
    # An arm that is not read is not judged either.
    can = {name: entry for name, entry in arms.items() if "quantize" not in entry or find_spec("torchao")}
    paths = {name: make(name, entry, target, preset.k, options.backend) for name, entry in can.items()}
    asked, tasks = _problems(preset, arms, target)
    header = {
        "target": identity.target,
        "dtype": identity.dtype,
        "preset": identity.preset,
        "texts": preset.texts,
        "origins": origins,
        "tasks": tasks,
        "k": preset.k,
        "window": preset.window,
        "stride": preset.stride,
        "backend": str(reference.lm.backend),
        "synthetic": target.synthetic,
        "versions": {**environment(), "weights": weights_of(identity.target)},
    }
    stem = f"quality-{slug(identity.target)}-{identity.dtype}-{identity.preset}"
    journal = options.root / "results" / f"{stem}.jsonl"
    what = {**header, "arms": arms, "tokens": texts, "asked": [asdict(problem) for problem in asked], "code": code()}
    finished, keep = open_lines(journal, what, options.resume)
    pieces = _needles(preset, paths)
    sizes = [len(paths) * (len(tokens) - 1) for tokens in texts.values()] + [length for _, length, _ in pieces]
    done = {each["id"]: each for each in finished}
    with progress("tokens") as tell:
        if options.resume:
            tell(0, 1, f"resuming: {len(done)} of {len(sizes)} pieces are there")
        behind = 0
        for (name, tokens), size in zip(texts.items(), sizes, strict=False):
            if name not in done:

                def told(judged: int, name: str = name, behind: int = behind) -> None:
                    tell(behind + judged, sum(sizes), name)

                losses, judged = read_side_by_side(reference, paths, tokens, preset.window, preset.stride, told)
                done[name] = {
                    "id": name,
                    "reference": _rounded(losses.tolist()),
                    "arms": {arm: _plain(each) for arm, each in judged.items()},
                }
                keep(done[name])
            behind += size
        hay = [sample.text for sample in documents(preset.needle.corpus)[0]] if pieces and preset.needle else []
        for arm, length, depth in pieces:
            name = f"needle {arm} {length} {depth}"
            if name not in done:
                tell(behind, sum(sizes), name)
                found = look_for(paths[arm], bury(target, hay, length, depth))
                done[name] = {"id": name, **asdict(Sought(arm, length, depth, **asdict(found)))}
                keep(done[name])
            behind += length
            tell(behind, sum(sizes), name)
    ways = {REFERENCE: reference, **{arm: path for arm, path in paths.items() if tasks and arm in tasks["arms"]}}
    answers = _answers(ways, asked, preset, done, keep) if asked and len(ways) > 1 else []
    run = QualityRun(
        header,
        arms,
        [document(done[name]) for name in texts],
        [
            Sought(**{key: value for key, value in done[f"needle {arm} {length} {depth}"].items() if key != "id"})
            for arm, length, depth in pieces
        ],
        answers,
    )
    file = options.root / "results" / f"{stem}.json"
    write_whole(file, write(run))
    journal.unlink(missing_ok=True)
    return Quality(run, file, margins, judge(run, limits))


def _needles(preset: QualityPreset, arms: Collection[str]) -> list[tuple[str, int, float]]:
    """Who looks for a needle of which length at which depth."""
    grid = preset.needle
    if grid is None:
        return []
    return list(product([arm for arm in grid.arms if arm in arms], grid.lengths, grid.depths))


def _problems(preset: QualityPreset, arms: Collection[str], target: LM) -> tuple[list[Problem], dict[str, Any] | None]:
    """What is asked, task by task, and what a run's header says of it; of a task that is not at hand, why."""
    grid = preset.tasks
    if grid is None or not set(grid.arms) & set(arms):
        return [], None
    asked: list[Problem] = []
    origins, missing = [], {}
    for task, count in grid.problems.items():
        try:
            found, origin = problems(task, count, target)
        except NotAtHandError as error:
            missing[task] = str(error)
        else:
            asked += found
            origins.append(origin)
    return asked, {**asdict(grid), "origins": origins, "missing": missing}


def _answers(
    ways: Mapping[str, DecodePath],
    asked: Sequence[Problem],
    preset: QualityPreset,
    done: dict[str, dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
) -> list[Answer]:
    """Every problem's answers, each way to decode in turn, and the finished ones from the journal."""
    answers = []
    pieces = list(product(asked, ways))
    with progress("answers") as tell:
        for number, (problem, arm) in enumerate(pieces):
            name = f"{problem.id} {arm}"
            tell(number, len(pieces), name)
            if name not in done and preset.tasks is not None:
                found = answer(arm, ways[arm], problem, preset.tasks.max_new_tokens)
                done[name] = {"id": name, **asdict(found)}
                keep(done[name])
            answers.append(Answer(**{key: value for key, value in done[name].items() if key != "id"}))
            tell(number + 1, len(pieces), name)
    return answers


def _plain(judged: Judged) -> dict[str, Any]:
    return {
        "nll": _rounded(judged.nll.tolist()),
        "kl": _rounded(judged.kl.tolist()),
        "agrees": judged.agrees.int().tolist(),
        "since": judged.since.tolist(),
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
