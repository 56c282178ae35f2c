"""What the documentation names exists."""

from __future__ import annotations

import pkgutil
import re
from configparser import ConfigParser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import specdecode
from specdecode import LM, FixedK, generate
from tests.helpers.models import greedy, lm, prompt
from tests.helpers.rooms import ROOMS
from tests.helpers.root import ROOT

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
    """Guards against a reader who is sent to a file that has moved."""
    paths = {path for path in PATHS.findall(words(page)) if not path.startswith(("results/", "./"))}
    places = (ROOT, ROOT / "specdecode", page.parent)
    assert not [path for path in sorted(paths) if not any((place / path).exists() for place in places)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_exists(page: Path) -> None:
    """Guards against names that a reader cannot import. In backticks a name may begin with a room."""
    names = set(DOTTED.findall(words(page)))
    rooms = {room.split("/")[0] for room in ROOMS}
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*)?`", words(page)):
        names |= {f"specdecode.{name}"} if name.split(".")[0] in rooms and not name.endswith((".py", ".md")) else set()
    assert not [name for name in sorted(names) if not exists(name)]


def exists(name: str) -> bool:
    """Whether it is a public name, a module (imported or not: packages of its own may lack) or a name in one."""
    if name.removeprefix("specdecode.") in specdecode.__all__:
        return True
    with suppress(ImportError):  # the name before the last is no package
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
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", words(target), re.MULTILINE)
        }
        assert not heading or heading in anchors, f"{path}#{heading}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".pre-commit-config.yaml"], ids=lambda page: page.name)
def test_every_environment_exists(page: Path) -> None:
    """Guards against a command of tox that was renamed."""
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    named = {name for names in re.findall(r"tox (?:exec )?-e ([\w,-]+\w)", words(page)) for name in names.split(",")}
    assert named <= {section.removeprefix("testenv:") for section in tox.sections()}


def test_the_rooms_are_listed_in_their_order() -> None:
    """Guards against a page of rooms that are no longer those of the package."""
    assert re.findall(r"^\| `([\w/]+)` \|", words(ARCHITECTURE), re.MULTILINE) == ROOMS


def test_the_drafter_of_the_page_decodes() -> None:
    """Guards against an example that a reader copies and that does not run."""
    blocks = re.findall(r"```python\n(.*?)```", words(ARCHITECTURE), re.DOTALL)
    (code,) = [block for block in blocks if "class" in block]
    names: dict[str, object] = {}
    exec(code, names)
    target: LM = lm("llama")
    make = names["examples"]
    assert callable(make)
    (drafter,) = make(target).values()
    result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=30)
    assert result.tokens == greedy("llama", 30)
    assert result.drafted > 0
