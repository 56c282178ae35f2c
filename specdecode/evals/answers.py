"""Answers of a model to the problems of a task, with one decode path after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdecode.core.result import Generation
from specdecode.decoding.generate import generate
from specdecode.drafters.lookup import PromptLookup
from specdecode.evals.data import rows, token_prompts
from specdecode.evals.perplexity import DecodePath
from specdecode.evals.results import Answer
from specdecode.evals.tasks import TASKS
from specdecode.models.lm import LM


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a task.

    Attributes:
        task: name in TASKS.
        id: id of the sample.
        prompt: token ids.
        row: row of the data set, with the fields by which answers are marked.
    """

    task: str
    id: str
    prompt: list[int]
    row: dict[str, Any]


def problems(task: str, count: int, lm: LM) -> tuple[list[Problem], str]:
    """Return the first problems of a task in their seeded order, and their origin.

    Questions become prompts as in `evals.data.token_prompts`. White space at the end of a text to continue is removed:
    it is often part of the next token.

    Raises:
        NotAtHandError: the data set is not available.
        ValueError: there is no such task, the task has fewer problems, or a row lacks a field.
    """
    if task not in TASKS:
        raise ValueError(f"no task is named {task!r}: choose from {', '.join(TASKS)}")
    prompts, (origin,) = token_prompts(f"{task}:{count}", lm)
    task_rows = rows(task)[0]
    problems = []
    for name, prompt in prompts.items():
        row = task_rows[int(name.rpartition("/")[2])]
        for column in TASKS[task].fields:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{name} has no text in its field {column!r}: it cannot be marked ({origin})")
        if continued := TASKS[task].continued:
            prompt = lm.encode(row[continued].rstrip())
        problems.append(Problem(task, name, prompt, row))
    return problems, origin


def answer(arm: str, path: DecodePath, problem: Problem, max_new_tokens: int) -> Answer:
    """Decode an answer greedily, and mark it.

    Prompt lookup drafts, so that steps are as wide as in normal decoding. The tokens do not depend on the drafts.

    Args:
        arm: name of the arm.
        path: the arm's decode path. Its drafter is not used, because it needs a known text.
        problem: problem to answer.
        max_new_tokens: tokens after which an answer is cut. A cut answer is marked too.

    Raises:
        ValueError: the model's context does not hold the problem and its answer.
    """
    task, lm = TASKS[problem.task], path.lm
    stop = task.stop if lm.tokenizer else ()
    generation = _continue(path, problem.prompt, max_new_tokens, stop)
    tokens, text = generation.tokens, _text(lm, generation.tokens)
    ended_by_a_string = generation.finish_reason == "stop" and tokens[-1] not in lm.stop_token_ids
    if ended_by_a_string and len(tokens) < max_new_tokens and (stop := task.go_on(text)):
        tokens = tokens + _continue(path, problem.prompt + tokens, max_new_tokens - len(tokens), stop).tokens
        text = _text(lm, tokens)
    return Answer(arm, problem.task, problem.id, task.mark(problem.row, text), len(tokens), text)


def _continue(path: DecodePath, prompt: list[int], max_new_tokens: int, stop: tuple[str, ...]) -> Generation:
    return generate(
        path.lm,
        prompt,
        drafter=PromptLookup(),
        controller=path.controller(),
        policy=path.policy,
        max_new_tokens=max_new_tokens,
        stop_token_ids=path.lm.stop_token_ids,
        stop=stop,
    )


def _text(lm: LM, tokens: list[int]) -> str:
    """Return tokens as text, without stop tokens and special tokens."""
    written = [token for token in tokens if token not in lm.stop_token_ids]
    if lm.tokenizer is None:
        # A model without a tokenizer, for rehearsals, reads and writes bytes.
        return bytes(token % 256 for token in written).decode("latin-1")
    return lm.spelling.text(written, special=False)
