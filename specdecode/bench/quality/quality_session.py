"""One session of `pytest --quality`: from its plan, piece by piece, to the run and the checks of its margins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from specdecode.bench.measure.journal import Journal, source_digest
from specdecode.bench.quality.plan import QualityPlan
from specdecode.core.errors import UnsupportedModelError
from specdecode.decoding.request import Request
from specdecode.evals.answers import Problem, answer, problems
from specdecode.evals.data import NotAtHandError, documents, token_prompts
from specdecode.evals.margins import MarginCheck, check_margins
from specdecode.evals.needle import Needle, bury, look_for
from specdecode.evals.perplexity import DecodePath, TokenScores, compare
from specdecode.evals.quality_presets import NeedleGrid, QualityPreset, make_decode_path, read_arm
from specdecode.evals.results import (
    REFERENCE,
    Answer,
    Document,
    NeedleTrial,
    QualityHeader,
    QualityRun,
    TasksHeader,
)
from specdecode.evals.results_file import document, given_answer, needle_trial, write
from specdecode.models.embedded import weights_of
from specdecode.models.lm import LM
from specdecode.support.checked import text
from specdecode.support.environment import environment
from specdecode.support.files import write_whole
from specdecode.support.messages import note
from specdecode.support.progress import progress

T = TypeVar("T")

# Digits of a value in a run's file: finer than any interval, and few enough to keep the file small.
_SIGNIFICANT_DIGITS = 7


@dataclass(frozen=True, slots=True)
class JudgedQualityRun:
    """A run of the quality suite, with the checks of its margins.

    Attributes:
        run: the run, as in its file.
        file: path of the run's file.
        margins_path: path of the margins; the file may not exist.
        checks: checks of the margins, for every arm and measure.
    """

    run: QualityRun
    file: Path
    margins_path: Path
    checks: list[MarginCheck]


@dataclass(frozen=True, slots=True)
class _Work:
    """The loaded contents of a session.

    Attributes:
        arms: the preset's entries of the selected arms.
        target: the model.
        reference: the decode path that all others are compared with.
        paths: the decode path of each arm, except INT8 arms that cannot be built here.
        texts: tokens of each document, by its id.
        origins: origins of the documents.
        needles: pairs of an arm and a needle that it looks for.
        problems: problems of all tasks.
        questions: pairs of a problem and the arm that answers it, which may be the reference.
        tasks: entry of the run's header about tasks; None without tasks.
    """

    arms: dict[str, dict[str, Any]]
    target: LM
    reference: DecodePath
    paths: dict[str, DecodePath]
    texts: dict[str, list[int]]
    origins: list[str]
    needles: list[tuple[str, Needle]]
    problems: list[Problem]
    questions: list[tuple[Problem, str]]
    tasks: TasksHeader | None


class Pieces:
    """The finished pieces of a session, by id. A missing piece is computed, and written to the journal at once.

    Args:
        journal: journal with the pieces of an interrupted session.

    Raises:
        ValueError: a piece is damaged.
    """

    def __init__(self, journal: Journal) -> None:
        self._by_id = dict(journal.read(_piece))
        self._journal = journal

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, name: str, kind: type[T], make: Callable[[], dict[str, Any]]) -> T:
        """Return the piece of a name, of the given kind. A missing piece is computed by `make`, as plain values."""
        if name not in self._by_id:
            values = {"id": name, **make()}
            self._by_id[name] = _piece(values)[1]
            self._journal.add(values)
        piece = self._by_id[name]
        if not isinstance(piece, kind):
            raise ValueError(f"{self._journal.path} is damaged at {name!r}: leave out --resume to start anew")
        return piece


def _piece(values: dict[str, Any]) -> tuple[str, Document | NeedleTrial | Answer]:
    """Return the id of a piece and the piece. Each kind is recognised by a key that only it has."""
    read = document if "reference" in values else needle_trial if "ranks" in values else given_answer
    return text(values, "id"), read(values)


def measure(plan: QualityPlan, selected: Collection[str]) -> JudgedQualityRun:
    """Run the selected arms of the preset, and judge them by the margins.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, or a model or a text cannot be loaded.
    """
    work = _load(plan, selected)
    header = _header(plan, work)
    session_values = {
        **asdict(header),
        "arms": work.arms,
        "tokens": work.texts,
        "asked": [asdict(problem) for problem in work.problems],
        "code": source_digest(),
    }
    journal = Journal(plan.journal, session_values, plan.resume)
    pieces = Pieces(journal)
    document_tokens = sum(len(work.paths) * (len(tokens) - 1) for tokens in work.texts.values())
    all_tokens = document_tokens + sum(needle.length for _, needle in work.needles)
    with progress("tokens") as show:
        if plan.resume:
            count = len(work.texts) + len(work.needles) + len(work.questions)
            show(0, 1, f"resuming: {len(pieces)} of {count} pieces are there")
        read = _read_documents(plan, work, pieces, lambda done, doing: show(done, all_tokens, doing))
        needles = _look_for_needles(work, pieces, lambda done, doing: show(document_tokens + done, all_tokens, doing))
    answers = _answers(plan, work, pieces)
    run = QualityRun(header, work.arms, read, needles, answers, datetime.now(timezone.utc).isoformat())
    write_whole(plan.file, write(run))
    journal.finish()
    return JudgedQualityRun(run, plan.file, plan.margins_path, check_margins(run, plan.margins))


def _load(plan: QualityPlan, selected: Collection[str]) -> _Work:
    """Load the target and the texts, and build the decode path of each arm."""
    preset, backend = plan.preset, plan.setup.backend
    arms = {arm: entry for arm, entry in preset.arms.items() if arm in selected}
    for arm, entry in arms.items():
        read_arm(arm, entry, preset.k)  # raises for a wrong entry before the model is loaded
    target = plan.setup.load_target()
    texts, origins = token_prompts(preset.texts, target)
    reference = make_decode_path(REFERENCE, {}, target, preset.k, backend)
    paths: dict[str, DecodePath] = {}
    unread: list[str] = []
    for arm, entry in arms.items():
        try:
            paths[arm] = make_decode_path(arm, entry, target, preset.k, backend)
        except (UnsupportedModelError, ValueError) as error:
            if "quantize" not in entry:
                raise
            unread.append(f"{arm} is left out: {error}")
    if not paths:
        raise ValueError("; ".join(unread))
    for sentence in unread:
        note(f"specdecode: {sentence}")
    needles = _bury_needles(preset.needle, paths, target) if preset.needle else []
    all_problems, tasks = _problems(preset, arms, target)
    asked = [arm for arm in paths if preset.tasks and arm in preset.tasks.arms]
    questions = list(product(all_problems, [REFERENCE, *asked])) if asked else []
    return _Work(arms, target, reference, paths, texts, origins, needles, all_problems, questions, tasks)


def _bury_needles(grid: NeedleGrid, paths: Mapping[str, DecodePath], target: LM) -> list[tuple[str, Needle]]:
    """Return the pairs of an arm and a needle that it looks for."""
    seekers = [arm for arm in grid.arms if arm in paths]
    if not seekers:
        return []
    haystack = [sample.text for sample in documents(grid.corpus)[0]]
    needles = [bury(target, haystack, length, depth) for length, depth in product(grid.lengths, grid.depths)]
    for arm, needle in product(seekers, needles):
        # Raises if the context cannot hold the needle.
        Request(target, needle.prompt, policy=paths[arm].policy, max_new_tokens=len(needle.answer))
    return list(product(seekers, needles))


def _problems(preset: QualityPreset, arms: Collection[str], target: LM) -> tuple[list[Problem], TasksHeader | None]:
    """Return the problems of all tasks, and the header's entry: origins, and reasons for missing tasks."""
    grid = preset.tasks
    if grid is None or not set(grid.arms) & set(arms):
        return [], None
    all_problems: list[Problem] = []
    origins, missing = [], {}
    for task, count in grid.problems.items():
        try:
            of_task, origin = problems(task, count, target)
        except NotAtHandError as error:
            missing[task] = str(error)
        else:
            all_problems += of_task
            origins.append(origin)
    return all_problems, TasksHeader(**asdict(grid), origins=origins, missing=missing)


def _header(plan: QualityPlan, work: _Work) -> QualityHeader:
    """Assemble the header of the run."""
    preset, identity = plan.preset, plan.setup.identity
    return QualityHeader(
        target=identity.target,
        dtype=identity.dtype,
        preset=identity.preset,
        texts=preset.texts,
        origins=work.origins,
        tasks=work.tasks,
        k=preset.k,
        window=preset.window,
        stride=preset.stride,
        backend=str(work.reference.lm.backend),
        synthetic=work.target.synthetic,
        versions={**environment(), "weights": weights_of(identity.target)},
    )


def _read_documents(plan: QualityPlan, work: _Work, pieces: Pieces, tell: Callable[[int, str], None]) -> list[Document]:
    """Read each document through all decode paths. `tell` gets the number of tokens read and the document's id."""
    read, done = [], 0
    for name, tokens in work.texts.items():

        def tell_judged(judged: int, name: str = name, done: int = done) -> None:
            tell(done + judged, name)

        read.append(pieces.get(name, Document, partial(_read_document, plan.preset, work, tokens, tell_judged)))
        done += len(work.paths) * (len(tokens) - 1)
    return read


def _read_document(
    preset: QualityPreset, work: _Work, tokens: list[int], tell: Callable[[int], None]
) -> dict[str, Any]:
    losses, scores = compare(work.reference, work.paths, tokens, preset.window, preset.stride, tell)
    return {"reference": _rounded(losses.tolist()), "arms": {arm: _plain(of_arm) for arm, of_arm in scores.items()}}


def _look_for_needles(work: _Work, pieces: Pieces, tell: Callable[[int, str], None]) -> list[NeedleTrial]:
    """Look for each needle. `tell` gets the number of tokens read and the needle's id."""
    trials, done = [], 0
    for arm, needle in work.needles:
        name = f"needle {arm} {needle.length} {needle.depth}"

        def look(arm: str = arm, needle: Needle = needle) -> dict[str, Any]:
            outcome = look_for(work.paths[arm], needle)
            return asdict(NeedleTrial(arm, needle.length, needle.depth, **asdict(outcome)))

        tell(done, name)
        trials.append(pieces.get(name, NeedleTrial, look))
        done += needle.length
        tell(done, name)
    return trials


def _answers(plan: QualityPlan, work: _Work, pieces: Pieces) -> list[Answer]:
    """Return the answers of the reference and of the asked arms to every problem."""
    grid = plan.preset.tasks
    if grid is None or not work.questions:
        return []
    paths = {REFERENCE: work.reference, **work.paths}
    answers = []
    with progress("answers") as tell:
        for number, (problem, arm) in enumerate(work.questions):
            name = f"{problem.id} {arm}"
            tell(number, len(work.questions), name)

            def ask(arm: str = arm, problem: Problem = problem) -> dict[str, Any]:
                return asdict(answer(arm, paths[arm], problem, grid.max_new_tokens))

            answers.append(pieces.get(name, Answer, ask))
            tell(number + 1, len(work.questions), name)
    return answers


def _plain(scores: TokenScores) -> dict[str, Any]:
    return {
        "nll": _rounded(scores.nll.tolist()),
        "kl": _rounded(scores.kl.tolist()),
        "agrees": scores.agrees.int().tolist(),
        "since": scores.since.tolist(),
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in values]
