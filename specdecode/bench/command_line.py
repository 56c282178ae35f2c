"""The suites' options of pytest, read from the command line and from `[tool.specdecode]`.

Options of other plugins that the suites cannot serve are refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.options import Options

PREFIX = "specdecode-"
"""Prefix of each option's second name, which no other plugin uses."""

_DEFAULTS = Options(root=Path())
_SESSION_OPTIONS: pytest.StashKey[Options] = pytest.StashKey()


def share(text: str) -> float:
    """Parse a share, written as 0.05 or as 5%.

    Raises:
        ValueError: the text is not a share.
    """
    number, percent = text.removesuffix("%"), text.endswith("%")
    value = float(number) / (100 if percent else 1)
    if not 0 < value < 1:
        raise ValueError(f"{text} is not a share above 0 and below 1")
    return value


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of pytest.

    Attributes:
        name: name of the field in `Options`, without dashes.
        help: help text, with the default in brackets.
        kind: type of the value, or its parser; bool for a flag.
        choices: the allowed values; None for any.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        return self.name.replace("_", "-")


_OPTIONS = (
    _Option("benchmark", "measure speed: run the speed suite", bool),
    _Option("quality", "measure quality: run the quality suite", bool),
    _Option("preset", f"arms, prompts and lengths: a name or a .toml file [{_DEFAULTS.preset}]"),
    _Option("target", f"target model, a name or folder for specdecode.load [{_DEFAULTS.target}]"),
    _Option("draft", "draft model; 'layers:0-9,29' uses these layers of the target [a subset of them]"),
    _Option("device", "cpu, cuda, cuda:1 ... [the first GPU, else the CPU]"),
    _Option("dtype", "float32, float16, bfloat16 [float32 on a CPU, float16 on a GPU]"),
    _Option(
        "backend",
        f"backend of our arms: eager, packed, exact, compile, graph, triton or auto, the fastest [{_DEFAULTS.backend}]",
    ),
    _Option(
        "tp",
        "auto: the processes of torchrun share the target's weights, decode together and report once [one process]",
        choices=("auto",),
    ),
    _Option(
        "device_map", "auto: spread the target's layers over all GPUs, if one is too small [one GPU]", choices=("auto",)
    ),
    _Option("draft_device", "device of the draft model, such as cuda:1 or cpu [the target's]"),
    _Option("max_new_tokens", "length of every output [as the preset says]", int),
    _Option(
        "prompts",
        "data sets as NAME[/CATEGORY][@TOKENS][:COUNT]: humaneval:4,spec-bench:13,spec-bench/qa:2,prose@20:all"
        " [as the preset says]",
    ),
    _Option("eos", "end outputs at the target's stop tokens [off: every output has the full length]", bool),
    _Option("tiny", "rehearse the preset in seconds, with the smallest models, texts and caches", bool),
    _Option("repeats", "blocks for each prompt [as the preset says]", int),
    _Option(
        "until",
        "measure further repeats of the arms with open verdicts, until the gate would detect a slowdown of SHARE, 5%%"
        " or 0.05 [off: the number of repeats is fixed]",
        share,
    ),
    _Option("budget_minutes", "with --until: minutes after which no further prompt is begun [30]", float),
    _Option(
        "again",
        f"the most time for measuring disturbed runs again, as a share of the rest; 0 for none [{_DEFAULTS.again:g}]",
        float,
    ),
    _Option("resume", "continue an interrupted run from its finished blocks", bool),
    _Option(
        "gate",
        "on: fail on REGRESSED and MISSING; off: never fail; strict: fail on all but PASS, IMPROVED and NOT_JUDGED"
        f" [{_DEFAULTS.gate}]",
        choices=("on", "off", "strict"),
    ),
    _Option("tolerance", "share by which a time may be worse [0.05; 0.02 with --against]", float),
    _Option("baselines", "folder of the baselines [baselines]"),
    _Option("baseline", "run file to judge by [the one for this hardware in the folder of the baselines]"),
    _Option("against", "measure the working tree and this commit side by side, and judge by the commit"),
)


def add_options(parser: pytest.Parser) -> None:
    """Add each option by its prefixed name, and by its short name unless another plugin uses it.

    Call this after the other plugins have added their options.
    """
    group = parser.getgroup("specdecode")
    free = _free_flags(parser, [option.flag for option in _OPTIONS])
    for option in _OPTIONS:
        names = [f"--{PREFIX}{option.flag}", *([f"--{option.flag}"] if option.flag in free else [])]
        values: dict[str, Any] = {"action": "store_true"} if option.kind is bool else {"type": option.kind}
        if option.choices:
            values["choices"] = option.choices
        group.addoption(*names, dest=_dest(option.name), default=None, help=option.help, **values)


def _free_flags(parser: pytest.Parser, flags: Sequence[str]) -> set[str]:
    """Return the flags that no plugin uses."""

    def unknown(*some: str) -> set[str]:
        """Return the flags that the parser does not know; none if it rejects the value of a known flag."""
        try:
            _, rest = parser.parse_known_and_unknown_args([f"--{flag}=" for flag in some])
        except (pytest.UsageError, SystemExit):
            return set()
        return {argument.strip("-=") for argument in rest}

    free = unknown(*flags)
    # Usually all flags are free. Otherwise each flag is tested alone, because one rejected flag hides the others.
    return free if len(free) == len(flags) else {flag for flag in flags if unknown(flag)}


def value_of(config: pytest.Config, name: str) -> Any:
    """Return an option's value on the command line; None if the option is not given."""
    return config.getoption(_dest(name), None)


def options_of(config: pytest.Config) -> Options:
    """Return the options: from the command line first, then from the repository's settings, then the defaults.

    Raises:
        ValueError: an option or a setting of the repository is wrong.
    """
    if _SESSION_OPTIONS not in config.stash:
        # It imports numpy, which would slow down every pytest session.
        from specdecode.bench.gate.project import read_project

        root = root_of(config)
        project = read_project(root)
        values = {field.name: value_of(config, field.name) for field in fields(Options)}
        from_command_line = {name: value for name, value in values.items() if value is not None}
        config.stash[_SESSION_OPTIONS] = Options(
            **{"root": root, "tolerances": project.tolerances, **project.options, **from_command_line}
        )
    return config.stash[_SESSION_OPTIONS]


def check_processes(config: pytest.Config) -> None:
    """Raise ValueError if pytest-xdist distributes the tests over processes."""
    if config.getoption("numprocesses", None) or config.getoption("tx", None) or hasattr(config, "workerinput"):
        raise ValueError(
            "the suites measure in one process, and pytest-xdist would start several: give -n0, and leave out --tx"
        )


def check_pytest_benchmark(config: pytest.Config) -> None:
    """Raise ValueError if pytest-benchmark is switched off or fails here, or its options disable tests of the gate."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise ValueError(
            "--benchmark needs pytest-benchmark: leave out -p no:benchmark, or pip install 'specdecode[benchmark]'"
        )
    if (plugin := version("pytest-benchmark")).startswith("5.2.") and pytest.version_tuple >= (9, 2):
        raise ValueError(f"pytest-benchmark {plugin} fails with pytest >= 9.2: pip install 'pytest-benchmark>=5.3'")
    for option, effect in (
        ("benchmark_disable", "would measure and keep nothing"),
        ("benchmark_skip", "would skip all that is measured"),
        ("benchmark_only", "would skip the verdicts, which are no benchmarks"),
        ("benchmark_cprofile", "would profile a replay of the times, which cannot run again"),
    ):
        if config.getoption(option, False):
            raise ValueError(
                f"--{option.replace('_', '-')} does not go with --benchmark: it {effect}; leave one of them out"
            )


def root_of(config: pytest.Config) -> Path:
    """Return the folder of the repository: pytest's rootdir if a configuration file or `--rootdir` sets it.

    Otherwise return the current folder. Pytest would infer its rootdir from the paths on the command line, including a
    model's folder in "--target FOLDER".
    """
    is_configured = config.inipath is not None or config.getoption("rootdir", None) is not None
    return config.rootpath if is_configured else config.invocation_params.dir


def _dest(name: str) -> str:
    return f"specdecode_{name}"
