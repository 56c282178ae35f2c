"""Tasks with answers that are right or wrong: GSM8K by the number that an answer ends with, HumanEval by the tests of
the problem. Nothing here needs a model; `evals.answers` asks one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from specdecode.evals.sandbox.contained import run

# A sign stands at the beginning of a number: in "7-3" there is none.
_NUMBER = re.compile(r"(?P<sign>(?<![\w)])-)?\$?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)", flags=re.ASCII)
# What comes after a function at the beginning of a line (Chen et al. 2021, "Evaluating Large Language Models Trained on
# Code"), and the end of a block of code in Markdown.
_AFTER_A_FUNCTION = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_END_OF_FUNCTION = re.compile("|".join(map(re.escape, _AFTER_A_FUNCTION)))


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of problem.

    Attributes:
        label: in tables.
        fields: of a row of its data set, that are needed to mark an answer.
        continued: the one of them that an answer goes on with; "" if the problem is a question.
        stop: strings that end an answer.
        mark: tells from a row and an answer why it is wrong; "" if it is right.
    """

    label: str
    fields: tuple[str, ...]
    continued: str
    stop: tuple[str, ...]
    mark: Callable[[Mapping[str, Any], str], str]


def last_number(text: str) -> Decimal | None:
    """The last number of a text: of "it is $1,250.00." 1250; None if there is none."""
    numbers = list(_NUMBER.finditer(text))
    return Decimal((numbers[-1]["sign"] or "") + numbers[-1]["digits"].replace(",", "")) if numbers else None


def wrong_number(row: Mapping[str, Any], answer: str) -> str:
    """GSM8K's exact match: why the last number of an answer is not the one behind #### in the row's; "" if it is.

    Raises:
        ValueError: there is no number in the row.
    """
    expected, found = last_number(row["answer"].rpartition("####")[2]), last_number(answer)
    if expected is None:
        raise ValueError(f"the answer {row['answer'][-40:]!r} has no number behind ####: correct its row, or remove it")
    if found is None:
        return "it has no number"
    return "" if found == expected else f"{found} in place of {expected}"


def completion(answer: str) -> str:
    """The function's own part of what a model wrote after its beginning."""
    return _END_OF_FUNCTION.split(answer, maxsplit=1)[0]


def program(row: Mapping[str, Any], answer: str) -> str:
    """A HumanEval problem with its completion, and its tests, which it runs."""
    return f"{row['prompt']}{completion(answer)}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def failure(row: Mapping[str, Any], answer: str) -> str:
    """HumanEval's pass@1: why a completion fails the tests of its problem, in a contained process; "" if it passes."""
    return run(program(row, answer))


TASKS = {
    "gsm8k": Task("GSM8K", ("answer",), "", (), wrong_number),
    "humaneval": Task("HumanEval", ("prompt", "test", "entry_point"), "prompt", _AFTER_A_FUNCTION, failure),
}
"""By the name of their data set."""
