"""Files of the quality suite's runs: JSON that is checked value by value when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from specdecode.evals.results import (
    REFERENCE,
    Answer,
    Document,
    NeedleTrial,
    QualityHeader,
    QualityRun,
    TasksHeader,
    Trace,
)
from specdecode.evals.tasks import TASKS
from specdecode.support.checked import (
    MOST_NATS,
    count,
    counts,
    flag,
    items,
    mapping,
    number,
    numbers,
    read_json,
    text,
    texts,
)

FORMAT = 1
KEY = "quality"

LEAST_NATS = -0.01
"""Least value of a -log p or a divergence: rounding brings values that cannot be negative a little below 0."""


def write(run: QualityRun) -> str:
    """Return the run as JSON. Its time is where pytest-benchmark's files have it."""
    values = asdict(run)
    datetime = values.pop("datetime")
    time = {"datetime": datetime} if datetime else {}
    return json.dumps({**time, KEY: {"format": FORMAT, **values}}) + "\n"


def is_run(path: Path) -> bool:
    """Return whether a file is a run of the quality suite; False for one that cannot be read."""
    try:
        content = read_json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and KEY in content


def read(path: Path) -> QualityRun:
    """Read a run from its file, and check every entry.

    Raises:
        ValueError: the file is missing or damaged, or no run of this version.
    """
    content = read_json(path)
    try:
        run = mapping(mapping(content, "the file")[KEY], KEY)
        if run["format"] != FORMAT:
            raise ValueError(f"its format is {run['format']!r}, and this version reads {FORMAT}: measure again")
        documents = [document(mapping(entry, "a document")) for entry in items(run["documents"], "documents")]
        if not any(entry.reference for entry in documents):
            raise ValueError("none of its documents has a token to predict")
        return QualityRun(
            _header(mapping(run["header"], "header")),
            {arm: _arm(mapping(entry, arm)) for arm, entry in mapping(run["arms"], "arms").items()},
            documents,
            [needle_trial(mapping(entry, "a needle")) for entry in items(run["needles"], "needles")],
            # Older files have no answers and no time.
            _answers(items(run.get("answers", []), "answers")),
            text(content, "datetime") if "datetime" in content else "",
        )
    except KeyError as error:
        raise ValueError(f"{path} is no run of `pytest --quality`: it has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _arm(entry: dict[str, Any]) -> dict[str, Any]:
    """Check the values of an arm's entry that tables and figures use."""
    if "cache" in entry:
        count(entry, "cache", least=1)
    for name in ("policy", "quantize", "control"):
        if name in entry:
            text(entry, name)
    return entry


def _header(entry: dict[str, Any]) -> QualityHeader:
    tasks = entry.get("tasks")  # older files have no tasks
    return QualityHeader(
        **{name: text(entry, name) for name in ("target", "dtype", "preset", "texts", "backend")},
        origins=texts(entry["origins"], "origins"),
        tasks=None if tasks is None else _tasks(mapping(tasks, "tasks")),
        k=count(entry, "k", least=1),
        window=None if entry["window"] is None else count(entry, "window", least=1),
        stride=None if entry["stride"] is None else count(entry, "stride", least=1),
        synthetic=flag(entry, "synthetic"),
        versions=dict(mapping(entry["versions"], "versions")),
    )


def _task(name: str) -> str:
    """Check the name of a task."""
    if name not in TASKS:
        raise ValueError(f"it has an unknown task {name[:40]!r}: known are {', '.join(TASKS)}")
    return name


def _tasks(entry: dict[str, Any]) -> TasksHeader:
    problems, missing = mapping(entry["problems"], "problems"), mapping(entry["missing"], "missing")
    return TasksHeader(
        problems={_task(task): count(problems, task) for task in problems},
        max_new_tokens=count(entry, "max_new_tokens", least=1),
        arms=texts(entry["arms"], "arms"),
        origins=texts(entry["origins"], "origins"),
        missing={_task(task): text(missing, task) for task in missing},
    )


def document(entry: dict[str, Any]) -> Document:
    """Read a document from its plain values.

    Raises:
        ValueError: a value is wrong, or an arm has another number of tokens than the reference.
    """
    reference = _losses(entry, "reference")
    arms = {arm: _trace(mapping(trace, arm)) for arm, trace in mapping(entry["arms"], "arms").items()}
    for arm, trace in arms.items():
        if any(len(getattr(trace, column.name)) != len(reference) for column in fields(Trace)):
            raise ValueError(f"{arm} does not have a value for each of the {len(reference)} tokens of {entry['id']}")
    return Document(text(entry, "id"), reference, arms)


def _losses(entry: dict[str, Any], name: str) -> list[float]:
    """Return the losses of all tokens."""
    losses = numbers(entry[name], name, LEAST_NATS)
    if losses:
        number({f"the mean of {name}": fmean(losses)}, f"the mean of {name}", most=MOST_NATS)
    return losses


def _trace(entry: dict[str, Any]) -> Trace:
    return Trace(
        nll=_losses(entry, "nll"),
        kl=numbers(entry["kl"], "kl", LEAST_NATS),
        agrees=counts(entry["agrees"], "agrees"),
        since=counts(entry["since"], "since"),
    )


def needle_trial(entry: dict[str, Any]) -> NeedleTrial:
    """Read the trial of a needle from its plain values.

    Raises:
        ValueError: a value is wrong.
    """
    ranks = counts(entry["ranks"], "ranks")
    if not ranks:
        raise ValueError("ranks is [], and an answer has at least one token")
    return NeedleTrial(
        arm=text(entry, "arm"),
        length=count(entry, "length", least=1),
        depth=number(entry, "depth", 0.0, 1.0),
        logprob=number(entry, "logprob", most=-LEAST_NATS),
        ranks=ranks,
        exact=flag(entry, "exact"),
    )


def _answers(entries: list[Any]) -> list[Answer]:
    answers = [given_answer(mapping(entry, "an answer")) for entry in entries]
    asked = {(answer.task, answer.problem) for answer in answers if answer.arm == REFERENCE}
    for answer in answers:
        if (answer.task, answer.problem) not in asked:
            raise ValueError(f"{answer.arm} answered {answer.problem!r}, which the reference did not")
    return answers


def given_answer(entry: dict[str, Any]) -> Answer:
    """Read an answer from its plain values.

    Raises:
        ValueError: a value is wrong.
    """
    names = ("arm", "task", "problem", "wrong", "text")
    _task(text(entry, "task"))
    return Answer(**{name: text(entry, name) for name in names}, tokens=count(entry, "tokens"))
