"""The structure of the package, read from its imports."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import specdecode
from tests.helpers.rooms import ROOMS

ROOT = Path(specdecode.__file__).parent

WITHOUT_TORCH = ("bench/runs", "bench/gate")
MAY_IMPORT_TRANSFORMERS = (
    "backends/grouped_attention.py",
    "backends/layers.py",
    "backends/row_attention.py",
    "backends/__init__.py",
    "bench/arms/",
    "evals/",
    "models/",
    "heads/",
    "training/",
)
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: str) -> Iterator[tuple[str, ...]]:
    """Yield every module that a file imports, anywhere in it, as a path of names. Imported names count as modules."""
    for node in ast.walk(tree(ROOT / file)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from ((*str(node.module).split("."), alias.name) for alias in node.names)


def room(file: str) -> str:
    """Return the room of a file or of an imported path: the longest name in the list that it begins with."""
    path = file.removesuffix(".py")
    found = [name for name in ROOMS if path == name or path.startswith(f"{name}/")]
    return max(found, key=len, default="")


def modules(file: str) -> Iterator[str]:
    """Yield the package's own modules that a file imports, as paths of files."""
    for path in imports(file):
        if path[0] != "specdecode":
            continue
        inside = path[1:]
        candidates = ["/".join(inside), "/".join(inside[:-1])]
        found = [f"{name}{end}" for name in candidates if name for end in (".py", "/__init__.py")]
        known = [name for name in found if name in FILES]
        # `from specdecode import name` imports the whole package, so only the command line may.
        assert known or room(file) == "cli" or inside[-1] == "__version__", f"{file} imports {'.'.join(path)}"
        yield from known[:1]


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_to_rooms_above(file: str) -> None:
    """Guards against parts that can no longer be read or replaced separately."""
    own = room(file)
    if file.endswith("__init__.py") and not own:  # the folder only holds rooms
        assert not list(modules(file))
        return
    assert own, f"{file} is in no room"
    for imported in modules(file):
        other = room(imported)
        assert other == own or ROOMS.index(other) < ROOMS.index(own), f"{file} imports {imported}"


def test_no_module_imports_itself_on_a_detour() -> None:
    """Guards against circular imports within a room."""
    graph = {file: set(modules(file)) - {file} for file in FILES if file != "__init__.py"}
    assert tuple(TopologicalSorter(graph).static_order())


def test_judging_needs_neither_torch_nor_scipy() -> None:
    """Guards against seconds of imports, and gigabytes of packages, to only read and judge a run file."""
    names = [f.removesuffix(".py").replace("/", ".") for f in FILES if room(f) in WITHOUT_TORCH and "__init__" not in f]
    imported = ", ".join(f"specdecode.{name}" for name in names)
    code = f"import sys, {imported}; sys.exit(bool({{'torch', 'scipy'}} & set(sys.modules)))"
    assert len(names) > 5
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", FILES)
def test_a_module_is_read_in_one_sitting(file: str) -> None:
    """Guards against modules and functions that grow by a few lines each time."""
    assert (ROOT / file).read_text().count("\n") <= 450
    functions = [node for node in ast.walk(tree(ROOT / file)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno and node.end_lineno - node.lineno >= 80]


@pytest.mark.parametrize("file", FILES)
def test_transformers_is_known_in_few_places(file: str) -> None:
    """Guards against a second caller of Hugging Face forwards, with its own rules for masks and positions."""
    if any(module[0] == "transformers" for module in imports(file)):
        assert file.startswith(MAY_IMPORT_TRANSFORMERS)


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.rglob("test_*.py")), ids=lambda file: file.stem)
def test_test_files_share_helpers_alone(file: Path) -> None:
    """Guards against tests that break, or run twice, when another test file changes."""
    modules = [node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if name.startswith("tests.") and not name.startswith("tests.helpers")]


def test_its_types_are_told() -> None:
    """Guards against an installed package whose annotations no type checker reads."""
    assert (ROOT / "py.typed").is_file()


def test_every_public_name_can_be_imported() -> None:
    """Guards against a public name at the top that no longer exists below."""
    for name in specdecode.__all__:
        assert getattr(specdecode, name).__name__ == name
    assert set(specdecode.__all__) <= set(dir(specdecode))
    with pytest.raises(AttributeError, match="nonsense"):
        specdecode.nonsense  # noqa: B018
