"""The settings of a repository for all of its runs: `[tool.specdecode]` in its pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from specdecode.bench.gate.baselines import TOLERANCE
from specdecode.bench.gate.verdicts import FAILING, tolerance_of
from specdecode.bench.runs.records import Header
from specdecode.support.checked import mapping, number, parse_toml, read_text, text

_TABLE = "tool.specdecode"


def _gate(values: Mapping[str, Any], name: str) -> str:
    """Return the entry of the gate, which must be a key of `FAILING`."""
    setting = text(values, name)
    if setting not in FAILING:
        raise ValueError(f"{name} is {setting!r}: choose from {', '.join(FAILING)}")
    return setting


def _share(values: Mapping[str, Any], name: str) -> float:
    """Return an entry that must be a tolerance."""
    return tolerance_of(number(values, name, 0.0, 1.0), 0.0)


_SETTINGS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    **dict.fromkeys(("target", "draft", "preset", "device", "dtype", "backend", "prompts", "baselines"), text),
    "gate": _gate,
    "tolerance": _share,
    "again": partial(number, least=0.0),
}


@dataclass(frozen=True, slots=True)
class Project:
    """The settings of a repository. Options of the command line override them.

    Attributes:
        options: values of options, by option name.
        tolerances: the share by which an arm's time may be worse, for arms that do not use `tolerance`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def tolerance(self, header: Header) -> float:
        """Return the share by which the time of any other arm of a run may be worse: that of the run's session, if its
        file has it."""
        return float(self.options.get("tolerance", TOLERANCE)) if header.tolerance is None else header.tolerance

    @property
    def gate(self) -> str:
        """The gate's setting, a key of `gate.verdicts.FAILING`: it decides which verdicts fail."""
        return str(self.options.get("gate", "on"))

    @property
    def baselines(self) -> Path:
        """The folder of the baselines."""
        return Path(self.options.get("baselines", "baselines"))


def read_project(root: Path) -> Project:
    """Read the settings of the repository in a folder. They are empty without a pyproject.toml or without the table.

    Raises:
        ValueError: the file cannot be read, or a setting is unknown or has the wrong type; the message names it.
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        return Project()
    table = parse_toml(read_text(file), str(file)).get("tool", {}).get("specdecode", {})
    try:
        return _project(mapping(table, _TABLE))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _project(table: Mapping[str, Any]) -> Project:
    known = [*_SETTINGS, "tolerances"]
    if unknown := [key for key in table if key not in known]:
        raise ValueError(f"{_TABLE} has no setting {unknown[0]!r}: choose from {', '.join(known)}")
    by_arm = mapping(table.get("tolerances", {}), "tolerances")
    return Project(
        options={key: read(table, key) for key, read in _SETTINGS.items() if key in table},
        tolerances={arm: _share(by_arm, arm) for arm in by_arm},
    )
