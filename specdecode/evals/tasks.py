"""Tasks whose answers are right or wrong: GSM8K by the last number of an answer, HumanEval by the tests of the problem.
This module needs no model; `evals.answers` produces the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from specdecode.evals.sandbox.contained import run

# Typeset characters and their ASCII forms: minus signs, non-breaking spaces, full-width digits, the fraction slash.
_TYPESET = str.maketrans(
    "\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}"
    "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{FIGURE SPACE}"
    "\N{FULLWIDTH COMMA}\N{FULLWIDTH FULL STOP}\N{RIGHT SINGLE QUOTATION MARK}\N{FRACTION SLASH}"
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19",
    "-----    ,.'/0123456789",
)
# LaTeX forms of numbers: 1{,}234, 1\,234, 1,\!234, \$5 and \frac{3}{4}.
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"\\[dt]?frac\{([\d.]+)\}\{(\d+)\}"), r"\1/\2"),
)
# A minus behind a digit, a letter or a closing bracket is no sign: "7-3" has none. A number uses one thousands
# separator throughout. Any other comma is a decimal point, as in continental Europe, except in a list such as 1,2,3.
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)}\]])-)?
    [$\N{POUND SIGN}\N{EURO SIGN}\N{YEN SIGN}]?
    (?P<whole>
        (?<![\d.])\d{1,3}(?:\.\d{3})+(?=,\d)    # 1.250,00
      | (?<!\d)\d{1,3}(?P<separator>[,'_ ])\d{3}(?:(?P=separator)\d{3})*(?!\d)
      | \d+
      | (?<![\w.])(?=\.\d)                      # .5
    )
    (?P<decimals>\.\d+ | (?<!\d,\d)(?<!\d,\d\d),\d+(?!,?\d))?
    (?:e(?P<exponent>[+-]?\d{1,3})(?!\w))?
    (?:/(?P<divisor>\d+)(?![\d/.,]*\d))?        # but not in 5/6/2024
    """,
    flags=re.ASCII | re.VERBOSE | re.IGNORECASE,
)
# Strings that end a function, at the beginning of a line (Chen et al. 2021, "Evaluating Large Language Models Trained
# on Code"), and the end of a block of code in Markdown.
_AFTER_A_FUNCTION = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_END_OF_FUNCTION = re.compile("|".join(map(re.escape, _AFTER_A_FUNCTION)))
# The start of a block of code at the beginning of an answer, and its end.
_OPENING_FENCE = re.compile(r"\s*```[^\n`]*(?:\n|\Z)")
_CLOSING_FENCE = re.compile(r"^```", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of problem.

    Attributes:
        label: name in tables.
        fields: fields of a data set's row that are needed to mark an answer.
        continued: the field that an answer continues; "" if the problem is a question.
        stop: strings that end an answer.
        go_on: returns the strings that end the rest of an answer if `stop` ended it too early; else no strings.
        mark: returns, from a row and an answer, the reason why the answer is wrong; "" if it is right.
    """

    label: str
    fields: tuple[str, ...]
    continued: str
    stop: tuple[str, ...]
    go_on: Callable[[str], tuple[str, ...]]
    mark: Callable[[Mapping[str, Any], str], str]


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, for example 1250 for "it is $1,250.00."; None if there is none."""
    text = text.translate(_TYPESET)
    for written, plain in _LATEX:
        text = written.sub(plain, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    whole = re.sub(r"\D", "", last["whole"]) or "0"
    value = Decimal(f"{last['sign'] or ''}{whole}.{(last['decimals'] or '.')[1:]}e{last['exponent'] or 0}")
    if last["divisor"] is None:
        return value
    divisor = Decimal(last["divisor"])
    # 1/2/3 and 1/0 are no fractions.
    return value / divisor if divisor and not text[: last.start()].endswith("/") else divisor


def wrong_number(row: Mapping[str, Any], answer: str) -> str:
    """Return why an answer fails GSM8K's exact match; "" if it passes.

    An answer passes if its last number equals the number behind #### in the row's answer.

    Raises:
        ValueError: the row has no such number.
    """
    expected, last = last_number(row["answer"].rpartition("####")[2]), last_number(answer)
    if expected is None:
        raise ValueError(f"the answer {row['answer'][-40:]!r} has no number behind ####: correct its row, or remove it")
    if last is None:
        return "it has no number"
    return "" if last == expected else f"{last} in place of {expected}"


def completion(answer: str) -> str:
    """Return the part of an answer that belongs to the function to complete, inside a code fence or without one."""
    return _END_OF_FUNCTION.split(_unfenced(answer), maxsplit=1)[0]


def unfinished(answer: str) -> tuple[str, ...]:
    """Return the strings that end the rest of an answer that was ended too early; none if it is finished.

    It was ended too early if it only opens a code fence, or repeats the function's head or the lines before it.
    """
    if _OPENING_FENCE.match(answer):
        return ("\n```",)
    return () if re.search(r"^[ \t]+\S", completion(answer), flags=re.MULTILINE) else _AFTER_A_FUNCTION


def program(row: Mapping[str, Any], answer: str) -> str:
    """Return a program that completes a HumanEval problem and runs its tests.

    An answer that repeats the whole function follows the problem, so that it may use the problem's imports and helpers.
    """
    code = _unfenced(answer)
    head = re.search(rf"^def {re.escape(row['entry_point'])}\b", code, flags=re.MULTILINE)
    if head and not code.lstrip("\n")[:1].isspace():
        solution = f"{_whole(row['prompt'])}\n\n{code[: head.end()]}{completion(code[head.end() :])}"
    else:
        solution = row["prompt"] + completion(answer)
    return f"{solution}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def _unfenced(answer: str) -> str:
    """Return the block of code at the beginning of an answer; the whole answer if it begins with none."""
    fence = _OPENING_FENCE.match(answer)
    return answer if fence is None else _CLOSING_FENCE.split(answer[fence.end() :], maxsplit=1)[0]


def _whole(beginning: str) -> str:
    """Return the beginning of a function as valid code. A beginning with a docstring is valid already."""
    try:
        compile(beginning, "beginning", "exec")
    except SyntaxError:
        return beginning + "    pass\n"
    return beginning


def failure(row: Mapping[str, Any], answer: str) -> str:
    """Return why an answer fails HumanEval's pass@1, its problem's tests in a contained process; "" if it passes."""
    return run(program(row, answer))


TASKS = {
    "gsm8k": Task("GSM8K", ("answer",), "", (), lambda _: (), wrong_number),
    "humaneval": Task("HumanEval", ("prompt", "test", "entry_point"), "prompt", _AFTER_A_FUNCTION, unfinished, failure),
}
"""All tasks, by the name of their data set."""
