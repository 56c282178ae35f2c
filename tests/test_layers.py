"""The shape of the package, read from its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import specdecode

ROOT = Path(specdecode.__file__).parent

# From the ground up. What stands on one line does not know of each other; a package stands where its folder is named,
# and its own modules may.
LAYERS = [
    ["support"],
    ["core"],
    ["controllers"],
    ["policies"],
    ["backends"],
    ["models"],
    ["heads"],
    ["drafters"],
    ["decoding"],
    ["evals"],
    ["bench"],
    ["training"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_TRANSFORMERS = (
    "backends/grouped_attention.py",
    "backends/__init__.py",
    "bench/arms/",
    "evals/",
    "models/",
    "training/",
)
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def imports(file: str) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports, wherever in it, as a path of names; imported names count as modules."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from ((*str(node.module).split("."), alias.name) for alias in node.names)


def home(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_to_lower_layers(file: str) -> None:
    """Guards against circles, and parts that can no longer be read, or replaced, by themselves."""
    own = home(file)
    assert own in HEIGHT, f"{own} has no layer"
    for module in imports(file):
        if module[0] != "specdecode":
            continue
        imported = module[1]
        if imported not in HEIGHT:
            # `from specdecode import name`: the whole package, so for what stands above all of it.
            assert own == "cli" or imported == "__version__", (
                f"{file} imports {'.'.join(module)} from the package itself"
            )
        else:
            assert imported == own or HEIGHT[imported] < HEIGHT[own], f"{file} imports {'.'.join(module)}"


@pytest.mark.parametrize("file", FILES)
def test_transformers_is_known_in_few_places(file: str) -> None:
    """Guards against a second caller of a Hugging Face forward, with its own idea of masks and positions."""
    if any(module[0] == "transformers" for module in imports(file)):
        assert file.startswith(MAY_IMPORT_TRANSFORMERS)


def test_every_public_name_can_be_imported() -> None:
    """Guards against a name that is promised at the top and has moved away below."""
    for name in specdecode.__all__:
        assert getattr(specdecode, name).__name__ == name
    assert set(specdecode.__all__) <= set(dir(specdecode))
    with pytest.raises(AttributeError, match="nonsense"):
        specdecode.nonsense  # noqa: B018
