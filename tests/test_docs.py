"""Every name in the documentation exists."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from contextlib import suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import specdecode
from specdecode import LM, FixedK, KeepAll, cli, generate
from specdecode.bench.arms.keys import PRESET_KEYS
from specdecode.bench.presets import Preset
from specdecode.evals.quality_presets import QualityPreset
from tests.helpers.characters import save
from tests.helpers.discovery import POLICIES
from tests.helpers.idioms import found
from tests.helpers.models import greedy, lm, prompt
from tests.helpers.rooms import ROOMS
from tests.helpers.root import ROOT
from tests.helpers.suites import ELSEWHERE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
# A file with its folder, or a folder; `...` and capitals stand for names that a reader fills in.
PATHS = re.compile(r"(?<![\w./*-])(?:[a-z0-9_.-]+/)+(?:[\w.-]+\.(?:py|toml|md|css|ini|sh)|(?=`))")
DOTTED = re.compile(r"(?<![\w./-])specdecode(?:\.[A-Za-z_]\w*)+")
LINKS = re.compile(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)")


def words(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    """Guards against a page that sends readers to a file that has moved."""
    paths = {path for path in PATHS.findall(words(page)) if not path.startswith(("results/", "./", ".venv/", "__"))}
    places = (ROOT, ROOT / "specdecode", page.parent)
    assert not [path for path in sorted(paths) if not any((place / path).exists() for place in places)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_exists(page: Path) -> None:
    """Guards against names on a page that cannot be imported. In backticks a name may begin with a room."""
    names = set(DOTTED.findall(words(page)))
    rooms = {room.split("/")[0] for room in ROOMS}
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*)?`", words(page)):
        names |= {f"specdecode.{name}"} if name.split(".")[0] in rooms and not name.endswith((".py", ".md")) else set()
    assert not [name for name in sorted(names) if not exists(name)]


def exists(name: str) -> bool:
    """Return whether this is a public name, a module or a name in a module.

    A module need not be importable: its own dependencies may be missing.
    """
    if name.removeprefix("specdecode.") in specdecode.__all__:
        return True
    with suppress(ImportError):  # the part before the last is no package
        if find_spec(name) is not None:
            return True
    with suppress(ImportError, AttributeError):
        pkgutil.resolve_name(name)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Guards against links to pages and headings that were renamed."""
    for path, heading in LINKS.findall(words(page)):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        if not heading:
            continue
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", words(target), re.MULTILINE)
        }
        assert heading in anchors, f"{path}#{heading}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".pre-commit-config.yaml"], ids=lambda page: page.name)
def test_every_environment_exists(page: Path) -> None:
    """Guards against a page with a tox command that was renamed."""
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    named = {name for names in re.findall(r"tox (?:exec )?-e ([\w,-]+\w)", words(page)) for name in names.split(",")}
    assert named <= {section.removeprefix("testenv:") for section in tox.sections()}


def test_idioms_are_found() -> None:
    """Guards against an idiom check that misses one, for example across a line break."""
    places = found("One sentence.\n# It goes\n# by the clock, and is at hand.")
    assert [(line, idiom) for line, idiom, _ in places] == [(2, "goes by"), (3, "at hand")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", words(page), re.DOTALL)


def commands(page: Path, program: str) -> list[list[str]]:
    """Return the arguments of a program's commands on a page, without comments and the rest of their lines."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index(program) + 1 :] for words in split if program in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path) -> None:
    """Guards against a page with a renamed option or a missing argument."""
    group: Any = typer.main.get_command(cli.app)
    for name, *arguments in commands(page, "specdecode"):
        command = group.get_command(typer.Context(group), name)
        assert command is not None, name
        if name != "lm-eval":  # lm-eval passes its options to the harness
            # Parse only: the named files are missing here. An unknown option raises.
            command.make_parser(typer.Context(command)).parse_args([*arguments])


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Return every option of pytest with the plugins that are installed here."""
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *ELSEWHERE, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", told.stdout))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_pytest_exists(page: Path, flags: set[str]) -> None:
    """Guards against a page with a renamed option of the suites."""
    used = {word.split("=")[0] for words in commands(page, "pytest") for word in words if word.startswith("-")}
    assert used <= flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_are_python_and_toml(page: Path) -> None:
    """Guards against a syntax error in code that a reader copies."""
    for block in blocks(page, "python"):
        # A snippet may end with a line that opens a block.
        compile(textwrap.dedent(block) + (" ..." if block.rstrip().endswith(":") else ""), page.name, "exec")
    for block in blocks(page, "toml"):
        tomllib.loads(block)


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/methods.md"])
def test_snippets_run(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an example that no longer works. The test uses a smaller model."""
    folder, names = str(save(tmp_path)), dict[str, object]()
    for block in blocks(ROOT / page, "python"):
        exec(block.replace("smollm2-135m", folder).replace("range(0, 30, 2)", "range(0, 4, 2)"), names)
    assert page != "README.md" or "tokens a step" in capsys.readouterr().out


def test_every_key_of_a_preset_is_listed() -> None:
    """Guards against an undocumented key of an arm, of a policy or of a preset."""
    first_cells = re.findall(r"^\| (`.*?) \|", words(ROOT / "docs" / "presets.md"), re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    policies = [type(policy) for policy in POLICIES.values() if not isinstance(policy, KeepAll)]
    settings = {name for policy in policies for name in inspect.signature(policy).parameters} - {"max_len"}
    presets = {field.name for kind in (Preset, QualityPreset) for field in fields(kind)}
    assert listed == {*PRESET_KEYS, *settings, *presets}


def test_the_rooms_are_listed_in_their_order() -> None:
    """Guards against a page whose rooms differ from the package's."""
    assert re.findall(r"^\| `([\w/]+)` \|", words(ARCHITECTURE), re.MULTILINE) == ROOMS


def test_the_drafter_of_the_page_decodes() -> None:
    """Guards against an example that a reader copies and that does not run."""
    (code,) = [block for block in blocks(ARCHITECTURE, "python") if "class" in block]
    names: dict[str, object] = {}
    exec(code, names)
    target: LM = lm("llama")
    make = names["examples"]
    assert callable(make)
    (drafter,) = make(target).values()
    result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=30)
    assert result.tokens == greedy("llama", 30)
    assert result.drafted > 0
