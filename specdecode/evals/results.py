"""A run of the quality suite: plain values, and the measures computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdecode.bench.runs.statistics import Estimate
from specdecode.evals.intervals import paired_loss, ratio_of_sums
from specdecode.evals.tasks import TASKS

MEASURES = {"nll": "ΔNLL", "kl": "KL"}
"""Costs in nats per token: the loss of log-probability of the text against the reference, and KL(reference || arm)."""

JUDGED = MEASURES | {name: task.label for name, task in TASKS.items()}
"""All measures with margins. The cost of a task is the share of its problems that is lost against the reference."""

REFERENCE = "reference"
"""The name of the reference among the arms of answers."""


@dataclass(frozen=True, slots=True)
class TasksHeader:
    """The task problems of a run.

    Attributes:
        problems: number of problems of each task.
        max_new_tokens: tokens after which an answer is cut.
        arms: arms that answered, beside the reference.
        origins: origins of the problems.
        missing: reason why a task was left out, by task name.
    """

    problems: dict[str, int]
    max_new_tokens: int
    arms: list[str]
    origins: list[str]
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class QualityHeader:
    """The target, the texts and the settings of a run.

    Attributes:
        target: name of the target, as it was given.
        dtype: type of the weights.
        preset: name of the preset.
        texts: data sets of the documents, as they were given.
        origins: origins of the documents.
        tasks: problems of the run; None if there were none.
        k: number of drafted tokens of a step.
        window: number of tokens that were read with one cache; None for whole documents.
        stride: number of tokens from one window to the next; None for half a window.
        backend: backend of the reference's forwards.
        synthetic: whether the weights are random.
        versions: versions of Python, torch, transformers and so on, and the source of the target's weights.
    """

    target: str
    dtype: str
    preset: str
    texts: str
    origins: list[str]
    tasks: TasksHeader | None
    k: int
    window: int | None
    stride: int | None
    backend: str
    synthetic: bool
    versions: dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Trace:
    """An arm's predictions of all tokens of a document but the first. See `evals.perplexity.TokenScores`.

    Attributes:
        nll: -log p of each token, in nats.
        kl: KL(reference || arm) at each token, in nats.
        agrees: 1 where the most probable token is the reference's, else 0.
        since: number of tokens read since the last eviction; 0 before the first.
    """

    nll: list[float]
    kl: list[float]
    agrees: list[int]
    since: list[int]


@dataclass(frozen=True, slots=True)
class Document:
    """One document, with the predictions of the reference and of all arms.

    Attributes:
        id: id of the sample.
        reference: -log p by the reference, in nats, of each token but the first.
        arms: the trace of each arm.
    """

    id: str
    reference: list[float]
    arms: dict[str, Trace]


@dataclass(frozen=True, slots=True)
class NeedleTrial:
    """One needle that an arm looked for: its place, and the `evals.needle.Retrieval`.

    Attributes:
        arm: name of the arm.
        length: number of tokens of the text.
        depth: place of the needle in the text, from 0 (the beginning) to 1.
        logprob: log-probability of the answer, in nats.
        ranks: rank of each token of the answer among all tokens by probability; 0 is the most probable.
        exact: whether greedy decoding writes the answer.
    """

    arm: str
    length: int
    depth: float
    logprob: float
    ranks: list[int]
    exact: bool


@dataclass(frozen=True, slots=True)
class NeedleCell:
    """The needles that an arm looked for at one length and depth.

    Attributes:
        count: number of needles.
        found: number of needles whose answer greedy decoding writes.
        logprob: mean log-probability of the answers, in nats.
        token_probability: mean over answers of the geometric mean of their tokens' probabilities.
    """

    count: int
    found: int
    logprob: float
    token_probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of an arm, or of the reference, to a problem.

    Attributes:
        arm: name of the arm, or REFERENCE.
        task: one of TASKS.
        problem: id of the problem's sample.
        wrong: reason why the answer is wrong; "" if it is right.
        tokens: number of tokens written.
        text: text of the answer without its stop token.
    """

    arm: str
    task: str
    problem: str
    wrong: str
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """The numbers of problems of a task that an arm solved.

    Attributes:
        count: number of problems.
        passed: number of problems that the arm solved.
        lost: number of problems that the reference solved, and the arm did not.
        won: number of problems that the arm solved, and the reference did not.
    """

    count: int
    passed: int
    lost: int
    won: int


@dataclass(frozen=True, slots=True)
class QualityRun:
    """One run of the quality suite.

    Attributes:
        header: target, texts and settings of the run.
        arms: the preset's entries, by name.
        documents: documents with their predictions.
        needles: trials with needles.
        answers: answers to problems of tasks.
        datetime: time of the run's end, in ISO 8601; "" in older files.
    """

    header: QualityHeader
    arms: dict[str, dict[str, Any]]
    documents: list[Document]
    needles: list[NeedleTrial]
    answers: list[Answer] = field(default_factory=list)
    datetime: str = field(default="", compare=False)

    @property
    def judged_arms(self) -> list[str]:
        """The arms that read the documents. An arm is left out if its weights could not be quantised there."""
        return [arm for arm in self.arms if all(arm in document.arms for document in self.documents)]

    def traces(self, arm: str) -> list[tuple[Document, Trace]]:
        """Return every document with the arm's trace of it."""
        return [(document, document.arms[arm]) for document in self.documents]

    def concerned(self, arm: str) -> Iterator[tuple[Document, Trace, np.ndarray]]:
        """Yield every document, its trace, and a mask of the tokens at which the arm can have a cost.

        With a cache policy these are the tokens after the first eviction, otherwise all tokens. The tokens before the
        first eviction would dilute the cost, most of all in short documents.
        """
        for document, trace in self.traces(arm):
            since = np.array(trace.since)
            yield document, trace, since > 0 if "policy" in self.arms[arm] else since >= 0

    def tokens(self, arm: str) -> int:
        """Return the number of tokens at which the arm can have a cost."""
        return sum(int(mask.sum()) for _, _, mask in self.concerned(arm))

    def cost(self, arm: str, measure: str) -> Estimate | None:
        """Estimate one of JUDGED, over documents or problems; None without evictions or answers."""
        if measure in TASKS:
            score = self.score(arm, measure)
            return paired_loss(score.lost, score.won, score.count) if score else None
        sums, tokens = [], []
        for document, trace, mask in self.concerned(arm):
            costs = np.array(trace.kl) if measure == "kl" else np.array(trace.nll) - np.array(document.reference)
            if mask.any():
                sums.append(float(costs[mask].sum()))
                tokens.append(float(mask.sum()))
        return ratio_of_sums(sums, tokens) if sums else None

    def tasks(self, arm: str) -> list[str]:
        """Return the tasks that the preset gives to an arm, whether available or not."""
        tasks = self.header.tasks
        return list(tasks.problems) if tasks and arm in tasks.arms else []

    def score(self, arm: str, task: str) -> Score | None:
        """Count the problems of a task that an arm, or the reference, solved; None without answers."""
        solved: dict[str, dict[str, bool]] = {arm: {}, REFERENCE: {}}
        for answer in self.answers:
            if answer.task == task and answer.arm in solved:
                solved[answer.arm][answer.problem] = not answer.wrong
        by_arm, by_reference = solved[arm], solved[REFERENCE]
        if not by_arm:
            return None
        lost = sum(by_reference[problem] and not passed for problem, passed in by_arm.items())
        won = sum(passed and not by_reference[problem] for problem, passed in by_arm.items())
        return Score(len(by_arm), sum(by_arm.values()), lost, won)

    def perplexity(self, arm: str | None = None) -> float:
        """Compute exp(sum of NLL / number of tokens) over all documents, for the reference if no arm is named."""
        losses = [document.reference for document in self.documents]
        if arm is not None:
            losses = [trace.nll for _, trace in self.traces(arm)]
        return math.exp(float(np.concatenate(losses).mean()))

    def divergence(self, arm: str, share: float) -> float:
        """Return a quantile of the KL over the concerned tokens, in nats; nan if there are none."""
        divergences = np.concatenate([np.array(trace.kl)[mask] for _, trace, mask in self.concerned(arm)])
        return float(np.quantile(divergences, share)) if len(divergences) else math.nan

    def agreement(self, arm: str) -> float:
        """Return the share of the concerned tokens with the reference's most probable token; nan if there are none."""
        agreements = np.concatenate([np.array(trace.agrees)[mask] for _, trace, mask in self.concerned(arm)])
        return float(agreements.mean()) if len(agreements) else math.nan

    def curve(self, arm: str, measure: str, along: str, bins: int = 24) -> list[tuple[float, float]]:
        """Average a measure in bins of equal width.

        Args:
            arm: name of the arm.
            measure: "kl" or "agrees".
            along: "position" in the document, or distance "since" the last eviction.
            bins: most bins.

        Returns:
            The middle and the mean of each bin that has tokens.
        """
        traces = [trace for _, trace in self.traces(arm)]
        values = np.concatenate([np.array(getattr(trace, measure), dtype=float) for trace in traces])
        if along == "since":
            places = np.concatenate([np.array(trace.since) for trace in traces])
            values, places = values[places > 0], places[places > 0]
        else:
            places = np.concatenate([1 + np.arange(len(trace.nll)) for trace in traces])
        if not len(places):
            return []
        width = max(-(-int(places.max()) // bins), 1)
        bin_of = (places - 1) // width
        return [
            (float(width * number + (width + 1) / 2), float(values[bin_of == number].mean()))
            for number in np.unique(bin_of).tolist()
        ]

    def by_cache(self) -> dict[str, list[str]]:
        """Group the arms that differ only in the size of a bounded cache, by their shared name, the smallest first."""
        groups: dict[str, list[str]] = {}
        bounded = [arm for arm in self.judged_arms if "cache" in self.arms[arm]]
        for arm in sorted(bounded, key=lambda arm: self.arms[arm]["cache"]):
            entry = {key: value for key, value in self.arms[arm].items() if key != "cache"}
            groups.setdefault(json.dumps(entry, sort_keys=True), []).append(arm)
        named: dict[str, list[str]] = {}
        for arms in groups.values():
            name = arms[0].removesuffix(f"-{self.arms[arms[0]]['cache']}")
            named[arms[0] if name in named else name] = arms
        return named

    def needle_cells(self, arm: str) -> dict[tuple[int, float], NeedleCell]:
        """Summarise the needles that an arm looked for, by length and depth."""
        trials: dict[tuple[int, float], list[NeedleTrial]] = {}
        for trial in self.needles:
            if trial.arm == arm:
                trials.setdefault((trial.length, trial.depth), []).append(trial)
        return {
            place: NeedleCell(
                count=len(same),
                found=sum(trial.exact for trial in same),
                logprob=sum(trial.logprob for trial in same) / len(same),
                token_probability=sum(math.exp(trial.logprob / len(trial.ranks)) for trial in same) / len(same),
            )
            for place, same in trials.items()
        }
