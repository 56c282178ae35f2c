"""Two versions of a repository on one machine, each in a worker process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from packaging.requirements import InvalidRequirement, Requirement

from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.models import LOG_FOLDER, SERVER_LOGS
from specdecode.bench.arms.run import Run
from specdecode.bench.runs.counts import from_dict
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.servers.keeper import GRACE_S
from specdecode.support.files import slug
from specdecode.support.git import git
from specdecode.support.worktree import import_environment, worktree

PROTOCOL = 3
"""Version of the protocol: the requests to a worker and its answers."""

WORKING_TREE = "the working tree"
"""Name of the version that is not a commit."""

_WORKER = Path("specdecode") / "bench" / "worker.py"

_UNLOAD_S = 2 * GRACE_S
"""Most seconds that a worker may take to end its servers."""


class WorkerProcess:
    """A process that measures one version of a repository on request (`bench.worker`).

    In a repository of this package, the process runs the version's own `bench.worker`; in others, the installed one.

    Args:
        name: name of the version, for messages.
        folder: folder of the version's source.
        arguments: arguments of the worker's `load`.
        logs: folder for the output of its servers.

    Raises:
        ValueError: the version cannot be measured; the message gives the reason.
    """

    def __init__(self, name: str, folder: Path, arguments: Mapping[str, Any], logs: Path = SERVER_LOGS) -> None:
        if (folder / "specdecode").is_dir() and not (folder / _WORKER).exists():
            raise ValueError(
                f"{name} cannot be measured side by side: it has no {_WORKER.as_posix()}; compare with a later commit"
            )
        self.name = name
        self._arguments = dict(arguments)
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specdecode.bench.worker"],
            cwd=folder,
            env=import_environment(folder) | {LOG_FOLDER: str(logs.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        self.about: dict[str, Any] = {}

    @property
    def takes_turns(self) -> bool:
        """Whether an arm has a server that must run alone."""
        return self._any_server_has("alone")

    def _any_server_has(self, key: str) -> bool:
        return any(entry.get("server", {}).get(key) for entry in self._arguments.get("arms", {}).values())

    def load(self) -> bool:
        """Load the models. Return False if they do not fit into memory."""
        answer = self._answer("load", self._arguments)
        if answer.get("memory"):
            return False
        self.about = self._value(answer, "load")
        if self.about["protocol"] != PROTOCOL:
            raise ValueError(
                f"{self.name} cannot be measured side by side: its worker uses another protocol; compare with a commit"
                " nearer to this version"
            )
        return True

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the worker's answer to a request.

        Raises:
            ArmError: an arm from code does not decode.
            ValueError: the worker reports an error, or has died; the message gives the reason.
        """
        return self._value(self._answer(do, arguments), _in_words(do, arguments))

    def run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        """Return one timed run of an arm."""
        return Run.from_json(self.ask("run", arm=arm, prompt=prompt, length=length, expected=expected))

    def slices(
        self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int], steps: int
    ) -> Generator[None, None, tuple[Run, list[float]]]:
        """Run an arm, and yield after each slice of some steps: the worker waits until the generator goes on.

        Returns:
            The timed run, and the seconds of each slice. A run that cannot pause is one slice.
        """
        wanted = {"arm": arm, "prompt": prompt, "length": length, "expected": expected, "steps": steps}
        answer = self._answer("run_in_slices", wanted)
        while "slice" in answer:
            yield
            answer = self._answer("next slice", {})
        value = self._value(answer, f"run {arm}")
        return Run.from_json(value["run"]), value["slices"]

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def counters_run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> CountersRun:
        """Run the arm once, untimed, and return its counters."""
        counted = self.ask("rehearse", arm=arm, prompt=prompt, length=length, expected=expected)
        return from_dict(CountersRun, counted)

    def close(self) -> None:
        """End the process. Wait until the servers that it started have ended, since they occupy memory."""
        try:
            if self._any_server_has("command"):
                with suppress(OSError, subprocess.TimeoutExpired):
                    self._process.communicate(json.dumps({"do": "unload"}) + "\n", timeout=_UNLOAD_S)
        finally:
            self._process.kill()
            self._process.communicate()
            self._words.close()

    def _answer(self, do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            code = self._process.wait()
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise ValueError(
                f"the worker of {self.name} died when asked to {_in_words(do, arguments)} (exit code {code}); its last"
                f" output: {words[-1]}"
            ) from None
        return answer

    def _value(self, answer: dict[str, Any], do: str) -> Any:
        if answer.get("of_arm"):
            raise ArmError(answer["error"])
        if "error" in answer:
            raise ValueError(f"{self.name} cannot {do}: {answer['error']}")
        return answer["value"]


_IN_WORDS = {
    "prompts": "read the prompts",
    "roofline": "measure the roofline",
    "expected": "write the expected output of",
    "check": "check the output of",
    "rehearse": "make the counters run of",
    "run_in_slices": "run",
    "next slice": "continue with the next slice",
}


def _in_words(do: str, arguments: Mapping[str, Any]) -> str:
    """Return a request in words, for messages."""
    return " ".join([_IN_WORDS.get(do, do), str(arguments.get("arm", ""))]).strip()


class Versions:
    """Two versions with their models in memory: both at once, or in turn if memory holds only one.

    Attributes:
        new, old: the workers.
        together: whether both versions' models are in memory at once.

    Raises:
        ValueError: a version cannot be loaded; the message gives the reason.
    """

    def __init__(self, new: WorkerProcess, old: WorkerProcess) -> None:
        self.new, self.old = new, old
        self.together = False
        self._loaded: WorkerProcess | None = None
        self.use(new)
        self.together = not new.takes_turns and old.load()
        self.use(old)

    @property
    def pauses(self) -> bool:
        """Whether runs of both can be measured in slices, in turns."""
        return self.together and all(worker.about.get("slices", False) for worker in (self.new, self.old))

    def use(self, worker: WorkerProcess) -> None:
        """Load the worker's models, unless they are in memory. Unload the other's if both do not fit."""
        if self.together or self._loaded is worker:
            return
        if self._loaded is not None:
            self._loaded.ask("unload")
        if not worker.load():
            raise ValueError(
                f"{worker.name} cannot load its models: even alone they do not fit into memory; take smaller models"
            )
        self._loaded = worker


@contextmanager
def versions(root: Path, new: str | None, old: str, arguments: Mapping[str, Any]) -> Iterator[Versions]:
    """Start a worker for each of two commits, or for the working tree and a commit, and load their models.

    Args:
        root: folder of the repository.
        new: a commit; None for the working tree.
        old: another commit.
        arguments: arguments of the workers' `load`.
    """
    with ExitStack() as stack:
        folders = [root if ref is None else stack.enter_context(worktree(root, ref)) for ref in (new, old)]
        workers = []
        for ref, folder in zip((new, old), folders, strict=True):
            # The checkout of a commit is removed at the end, and the logs must stay.
            logs = root / SERVER_LOGS / ("" if ref is None else slug(ref))
            workers.append(WorkerProcess(ref or WORKING_TREE, folder, _found_from(folder, arguments), logs))
            stack.callback(workers[-1].close)
        yield Versions(*workers)


def _found_from(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's arguments with paths of models and heads that it finds from its folder.

    A path that the version itself has stays as it is, so each version loads its own. Others are relative to the current
    folder.
    """

    def resolved(name: str) -> str:
        here = Path(name).expanduser()
        return str(here.resolve()) if name and here.exists() and not (folder / here).exists() else name

    entries = {
        arm: entry | ({"head": resolved(entry["head"])} if isinstance(entry.get("head"), str) else {})
        for arm, entry in arguments["arms"].items()
    }
    return {**arguments, "arms": entries, **{model: resolved(arguments[model]) for model in ("target", "draft")}}


def dependencies(root: Path, ref: str) -> list[str]:
    """Return the packages that another commit pins to other versions, as "NAME THEIRS -> OURS"."""
    theirs, ours = (_pins(_constraints(root, commit)) for commit in (ref, None))
    return [
        f"{name} {theirs.get(name, 'none')} -> {ours.get(name, 'none')}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def _pins(constraints: str) -> dict[str, str]:
    """Return the versions of the packages that constraints pin in this environment."""
    pins = {}
    for line in constraints.splitlines():
        with suppress(InvalidRequirement):  # a comment, an empty line, or an option of pip
            pin = Requirement(line.partition("#")[0].strip())
            if pin.specifier and (pin.marker is None or pin.marker.evaluate()):
                pins[pin.name] = str(pin.specifier).removeprefix("==")
    return pins


def _constraints(root: Path, ref: str | None) -> str:
    try:
        if ref is not None:
            return git("show", f"{ref}:./constraints.txt", root=root)
        return (root / "constraints.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
