"""A run of the quality suite: plain values that travel as JSON, what they come to, and what margins say of that."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from specdecode.bench.runs.statistics import Estimate, detectable
from specdecode.evals.intervals import Outcome, non_inferior, paired_loss, ratio_of_sums
from specdecode.evals.tasks import TASKS

FORMAT = 1
_KEY = "quality"

MEASURES = {"nll": "ΔNLL", "kl": "KL"}
"""What has margins, in nats a token: how much less probable the text is than by the reference, and KL(reference ||
arm)."""

JUDGED = MEASURES | {task: of.label for task, of in TASKS.items()}
"""All that has margins: of a task it is how many fewer of its problems are solved than by the reference, as a share."""

REFERENCE = "reference"
"""The name under which the reference answers."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What an arm made of a document, token by token: all but the first. See `evals.perplexity.Judged`.

    Attributes:
        nll: -log p, in nats.
        kl: KL(reference || arm), in nats.
        agrees: 1 where the most probable token is the reference's, else 0.
        since: tokens read since the last eviction; 0 before the first.
    """

    nll: list[float]
    kl: list[float]
    agrees: list[int]
    since: list[int]


@dataclass(frozen=True, slots=True)
class Document:
    """One document as everyone read it.

    Attributes:
        id: of the sample.
        reference: -log p by the reference, in nats, of each token but the first.
        arms: what each arm made of it.
    """

    id: str
    reference: list[float]
    arms: dict[str, Trace]


@dataclass(frozen=True, slots=True)
class Sought:
    """One needle that an arm looked for. See `evals.needle`."""

    arm: str
    length: int
    depth: float
    logprob: float
    ranks: list[int]
    exact: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What an arm, or the reference, made of a problem.

    Attributes:
        arm: by name, or REFERENCE.
        task: of TASKS.
        problem: id of its sample.
        wrong: why it is; "" if it is right.
        tokens: that were written.
        text: of them, without the stop token.
    """

    arm: str
    task: str
    problem: str
    wrong: str
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """How often an arm solved the problems of a task.

    Attributes:
        count: problems.
        passed: of them.
        lost: those that the reference solved, and the arm did not.
        won: those that the arm solved, and the reference did not.
    """

    count: int
    passed: int
    lost: int
    won: int


@dataclass(frozen=True, slots=True)
class QualityRun:
    """One run.

    Attributes:
        header: what was judged and with what: "target", "dtype", "preset", "texts", "origins", "k", "window", "stride",
            "backend", "synthetic" and "versions"; and "tasks", if there are any: "problems" (how many of each),
            "max_new_tokens", "arms", "origins", and "missing" (why tasks were not asked, by name).
        arms: the preset's entries, by name.
        documents: as they were read.
        needles: as they were looked for.
        answers: as they were given.
    """

    header: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    documents: list[Document]
    needles: list[Sought]
    answers: list[Answer] = field(default_factory=list)

    @property
    def judged_arms(self) -> list[str]:
        """The arms that read the documents: all, but for want of a package."""
        return [arm for arm in self.arms if all(arm in document.arms for document in self.documents)]

    def traces(self, arm: str) -> list[tuple[Document, Trace]]:
        """The documents and what an arm made of each."""
        return [(document, document.arms[arm]) for document in self.documents]

    def concerned(self, arm: str) -> Iterator[tuple[Document, Trace, np.ndarray]]:
        """Where an arm can cost anything: with a cache policy the tokens behind the first eviction, else all. What
        comes before would make every cost as small as the texts are short."""
        for document, trace in self.traces(arm):
            since = np.array(trace.since)
            yield document, trace, since > 0 if "policy" in self.arms[arm] else since >= 0

    def tokens(self, arm: str) -> int:
        """How many tokens those are."""
        return sum(int(where.sum()) for _, _, where in self.concerned(arm))

    def cost(self, arm: str, measure: str) -> Estimate | None:
        """One of JUDGED, with its interval over documents or problems; None where nothing was evicted or asked."""
        if measure in TASKS:
            score = self.score(arm, measure)
            return paired_loss(score.lost, score.won, score.count) if score else None
        above, below = [], []
        for document, trace, where in self.concerned(arm):
            values = np.array(trace.kl) if measure == "kl" else np.array(trace.nll) - np.array(document.reference)
            if where.any():
                above.append(float(values[where].sum()))
                below.append(float(where.sum()))
        return ratio_of_sums(above, below) if above else None

    def tasks(self, arm: str) -> list[str]:
        """The tasks that an arm is to be asked, at hand or not."""
        asked = self.header.get("tasks")
        return list(asked["problems"]) if asked and arm in asked["arms"] else []

    def score(self, arm: str, task: str) -> Score | None:
        """How an arm, or the reference, did at a task; None if it was not asked."""
        given = [each for each in self.answers if each.task == task]
        own, reference = (
            {each.problem: not each.wrong for each in given if each.arm == who} for who in (arm, REFERENCE)
        )
        if not own:
            return None
        lost = sum(reference[problem] and not passed for problem, passed in own.items())
        won = sum(passed and not reference[problem] for problem, passed in own.items())
        return Score(len(own), sum(own.values()), lost, won)

    def perplexity(self, arm: str | None = None) -> float:
        """exp(sum of NLL / number of tokens) over all documents; the reference's, if no arm is named."""
        losses = [document.reference for document in self.documents]
        if arm is not None:
            losses = [trace.nll for _, trace in self.traces(arm)]
        every = np.concatenate(losses)
        return math.exp(float(every.mean()))

    def divergence(self, arm: str, share: float) -> float:
        """The KL, in nats, below which this share of the tokens concerned lies; nan if there are none."""
        every = np.concatenate([np.array(trace.kl)[where] for _, trace, where in self.concerned(arm)])
        return float(np.quantile(every, share)) if len(every) else math.nan

    def agreement(self, arm: str) -> float:
        """The share of the tokens concerned at which the most probable token is the reference's; nan if none are."""
        every = np.concatenate([np.array(trace.agrees)[where] for _, trace, where in self.concerned(arm)])
        return float(every.mean()) if len(every) else math.nan

    def curve(self, arm: str, of: str, along: str, bins: int = 24) -> list[tuple[float, float]]:
        """The mean of "kl" or "agrees" along the "position" in the document or the distance "since" the last eviction.

        Args:
            arm: by name.
            of: what is averaged.
            along: in bins of equal width.
            bins: the most of them.

        Returns:
            The middle of each bin that has tokens, and the mean there.
        """
        traces = [trace for _, trace in self.traces(arm)]
        values = np.concatenate([np.array(getattr(trace, of), dtype=float) for trace in traces])
        if along == "since":
            places = np.concatenate([np.array(trace.since) for trace in traces])
            values, places = values[places > 0], places[places > 0]
        else:
            places = np.concatenate([1 + np.arange(len(trace.nll)) for trace in traces])
        if not len(places):
            return []
        width = max(-(-int(places.max()) // bins), 1)
        which = (places - 1) // width
        return [
            (float(width * each + (width + 1) / 2), float(values[which == each].mean()))
            for each in np.unique(which).tolist()
        ]

    def grid(self, arm: str) -> dict[tuple[int, float], list[Sought]]:
        """The needles that an arm looked for, by length and depth."""
        found: dict[tuple[int, float], list[Sought]] = {}
        for each in self.needles:
            if each.arm == arm:
                found.setdefault((each.length, each.depth), []).append(each)
        return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an arm keeps a margin.

    Attributes:
        arm: by name.
        measure: of JUDGED.
        verdict: of the interval; None where there is no margin, or nothing to judge.
        expected: FAIL of a negative control, PASS of all others.
        reason: in words.
    """

    arm: str
    measure: str
    verdict: Outcome | None
    expected: Outcome
    reason: str


def judge(run: QualityRun, margins: Mapping[str, Mapping[str, float]]) -> list[Judgement]:
    """One judgement for each arm and measure, by non-inferiority.

    A negative control is judged by the margin of the arm that it names, and has to fail: a measurement in which it
    passes could not have seen a fault of that arm either.

    Args:
        run: that is judged.
        margins: for each arm, how much more than the reference it may cost by each measure: in nats a token, or as a
            share of a task's problems.
    """
    found = []
    for arm, entry in run.arms.items():
        expected = Outcome.FAIL if "control" in entry else Outcome.PASS
        for measure in [*MEASURES, *run.tasks(arm)]:
            name, unit = JUDGED[measure], "nats a token" if measure in MEASURES else "fewer solved, as a share"
            margin = margins.get(entry.get("control", arm), {}).get(measure)
            cost = run.cost(arm, measure) if arm in run.judged_arms else None
            verdict = None
            if arm not in run.judged_arms:
                reason = "not read: INT8 needs torchao"
            elif cost is None and measure in TASKS:
                reason = run.header["tasks"]["missing"][measure]
            elif cost is None:
                reason = "nothing was evicted: the texts are shorter than the cache"
            elif run.header["synthetic"]:
                reason = f"{name} {cost:.4f} {unit}: random weights have no quality to lose"
            else:
                limit = "no margin is set" if margin is None else f"margin {margin:g}"
                verdict = None if margin is None else non_inferior(cost, margin)
                reason = (
                    f"{name} {cost:.4f} {unit}, {limit}; what can be told from none begins at {detectable(cost):.4f}"
                )
            found.append(Judgement(arm, measure, verdict, expected, reason))
    return found


def write(run: QualityRun) -> str:
    """The run as JSON."""
    return json.dumps({_KEY: {"format": FORMAT, **asdict(run)}}) + "\n"


def is_run(path: Path) -> bool:
    """Whether a file is a run of the quality suite, if anything: what cannot be read is none."""
    try:
        content = _json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and _KEY in content


def read(path: Path) -> QualityRun:
    """A run from its file.

    Raises:
        ValueError: it is not there, not whole, or no run of this version.
    """
    content = _json(path)
    try:
        held = content[_KEY]
        if held["format"] != FORMAT:
            raise ValueError(f"its format is {held['format']!r}, and this version reads {FORMAT}: measure again")
        documents = [document(each) for each in held["documents"]]
        needles = [Sought(**each) for each in held["needles"]]
        answers = [Answer(**each) for each in held.get("answers", [])]
        return QualityRun(held["header"], held["arms"], documents, needles, answers)
    except KeyError as error:
        raise ValueError(f"{path} is no run of `pytest --quality`: it has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def document(entry: Mapping[str, Any]) -> Document:
    """A document from its plain values.

    Raises:
        ValueError: an arm judged more tokens than another, or fewer.
    """
    arms = {arm: Trace(**trace) for arm, trace in entry["arms"].items()}
    count = len(entry["reference"])
    for arm, trace in arms.items():
        if any(len(getattr(trace, each.name)) != count for each in fields(Trace)):
            raise ValueError(f"{arm} did not judge the {count} tokens of {entry['id']}")
    return Document(entry["id"], entry["reference"], arms)


def read_margins(path: Path) -> dict[str, dict[str, float]]:
    """The margins of a file, by arm and measure; none, if there is no such file.

    Raises:
        ValueError: it is damaged, or has margins of something else.
    """
    if not path.exists():
        return {}
    margins = _json(path).get("margins")
    if not isinstance(margins, dict):
        raise ValueError(f"{path} has no margins: write {{arm: {{measure: margin}}}} there")
    for arm, own in margins.items():
        for measure, margin in own.items():
            number = isinstance(margin, int | float) and not isinstance(margin, bool)
            if measure not in JUDGED or not number or not margin > 0:
                raise ValueError(
                    f"{path} sets {arm} a margin of {margin!r} for {measure!r}: it is above 0, for one of"
                    f" {', '.join(JUDGED)}"
                )
    return margins


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not whole: it is no JSON") from None
