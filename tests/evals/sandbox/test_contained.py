"""Programs that misbehave, each within harmless bounds: none would do damage even without containment."""

from __future__ import annotations

import ctypes
import inspect
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdecode.evals.sandbox.contained import Limits, run

SHORT = Limits(seconds=1.0)
SMALL = Limits(memory_bytes=128 << 20)


@pytest.fixture(autouse=True)
def the_next_program_is_judged() -> Iterator[None]:
    """Check that the eval continues after each test's program."""
    yield
    assert run("assert sum(range(5)) == 10") == ""


def test_what_ends_a_program_is_told() -> None:
    """Guards against a failed program that is counted as right."""
    assert run("assert sum(range(5)) == 11") == "AssertionError:"
    assert run("def f(:").startswith("SyntaxError: ")
    assert run("raise ValueError('one\\ntwo')") == "ValueError: one two"
    assert run("\0") != ""
    assert run("x = '\ud800'") != ""
    assert len(run("raise ValueError('long' * 1000)")) == Limits().reason_characters


@pytest.mark.parametrize(
    "leave",
    ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)", "import os; os.close(1)"],
)
def test_a_program_that_leaves_early_has_not_passed(leave: str) -> None:
    """Guards against an early exit with code 0 counted as passed tests."""
    assert run(f"{leave}\nassert False") != ""


@pytest.mark.parametrize(
    "loop",
    [
        "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass",
        "import time\ntime.sleep(20)",
        "import os, time\nos.close(1); os.close(2)\ntime.sleep(20)",
    ],
)
def test_an_endless_loop_ends(loop: str) -> None:
    """Guards against an eval that waits for ever."""
    assert run(loop, SHORT) in ("it took longer than 1 s", "it ended before it was done")


def test_unbounded_memory_is_bounded() -> None:
    """Guards against a program whose memory makes the machine swap."""
    assert run("held = [bytearray(10 << 20) for _ in range(60)]", SMALL).startswith("MemoryError")


def test_output_without_end_is_cut() -> None:
    """Guards against a log, or a memory, that a program's output fills."""
    for stream in ("stdout", "stderr"):
        program = f"import sys\nfor _ in range(2000): print('x' * 1000, file=sys.{stream})"
        assert run(program) == f"it wrote more than {Limits().output_bytes} bytes"


@pytest.mark.parametrize(
    "start",
    [
        "if os.fork() == 0: act()",
        "if os.forkpty()[0] == 0: act()",
        "os.system(f'touch {mark}')",
        "os.popen(f'touch {mark}')",
        "os.posix_spawn('/usr/bin/touch', ['touch', mark], {})",
        "os.execv('/usr/bin/touch', ['touch', mark])",
        "import subprocess; subprocess.run(['touch', mark])",
        "import _posixsubprocess",
        "import multiprocessing; multiprocessing.Process(target=act).start()",
    ],
)
def test_there_are_no_children(start: str, tmp_path: Path) -> None:
    """Guards against many processes, some of which outlive their program."""
    mark = tmp_path / "child"
    program = f"import os, time\nmark = {str(mark)!r}\ndef act():\n    time.sleep(5)\n    os._exit(0)\n"
    assert "is refused here" in run(f"{program}for _ in range(3):\n    {start}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "act",
    [
        "os.remove(file)",
        "os.unlink(bytes(file, 'utf8'))",
        "os.remove(os.path.relpath(file))",
        "os.rename(file, 'mine')",
        "os.rename('own', file)",
        "os.replace('own', file)",
        "os.truncate(file, 0)",
        "os.link(file, 'mine'); open('mine', 'w').close()",
        "os.symlink(file, 'mine'); open('mine', 'w').close()",
        "os.chmod(file, 0)",
        "os.utime(file, (0, 0))",
        "open(file, 'w').close()",
        "open(file, 'a').write('more')",
        "open(file, 'r+').truncate()",
        "os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))",
        "os.open('file', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open(os.path.dirname(file), os.O_RDONLY))",
        "os.chdir(os.path.dirname(file)); os.remove('file')",
        "pathlib.Path(file).unlink()",
        "shutil.rmtree(os.path.dirname(file))",
        "open(file).read()",
        "os.mkfifo(file + '.new')",
        "os.mkdir(file + '.new')",
        "open(type('', (str,), {'startswith': lambda *_: True, 'split': lambda *_: []})(file), 'w').close()",
    ],
)
def test_files_outside_stay_what_they_are(act: str, tmp_path: Path) -> None:
    """Guards against a generated program that destroys the user's files, by any function, and against a hook that
    relies on a protection which not every kernel has.
    """
    file = tmp_path / "file"
    file.write_text("precious")
    before = file.stat()
    program = f"import os, pathlib, shutil\nopen('own', 'w').close()\nfile = {str(file)!r}\n{act}"
    wrong = run(program)
    assert wrong
    assert "[Errno" not in wrong
    assert file.read_text() == "precious"
    after = file.stat()
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, 1)
    assert list(tmp_path.iterdir()) == [file]


def _landlock() -> bool:
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


@pytest.mark.skipif(not _landlock(), reason="the kernel has no Landlock")
def test_the_kernel_protects_files_from_what_the_hook_does_not_see(tmp_path: Path) -> None:
    """Guards against a kernel lock that depends on the hook: a fresh copy of the C module has all removed functions."""
    program = (
        "import importlib.util\nfrom importlib._bootstrap import _imp\n"
        "again = _imp.create_builtin(importlib.util.find_spec('posix'))\n"
        f"again.mkfifo('own')\nagain.mkfifo({str(tmp_path / 'fifo')!r})"
    )
    assert run(program).startswith("PermissionError: [Errno 13]")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_its_own() -> None:
    """Guards against programs that fail at permitted file operations, or find files of an earlier program."""
    program = (
        "import os, shutil, tempfile\nassert os.listdir() == []\n"
        "os.mkdir('a')\nopen('a/b', 'w').write('c')\nassert open('a/b').read() == 'c'\n"
        "os.rename('a/b', 'b')\nos.remove('b')\nshutil.rmtree('a')\nassert os.listdir() == []\n"
        "open(os.path.join(os.getcwd(), 'left'), 'w').write('here')"
    )
    assert run(program) == run(program) == ""


def test_what_is_written_is_bounded() -> None:
    """Guards against a program that fills the disk, by one file or by many."""
    assert run("file = open('big', 'wb')\nfor _ in range(20): file.write(bytes(1 << 20))").startswith("OSError")
    assert "refused" in run("for i in range(200): open(str(i), 'w').close()")


@pytest.mark.parametrize(
    "connect",
    [
        "import socket; socket.create_connection(('127.0.0.1', port), 2)",
        "import _socket; _socket.socket().connect(('127.0.0.1', port))",
        "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=2)",
        "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', port))",
        "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)",
    ],
)
def test_there_is_no_network(connect: str) -> None:
    """Guards against a program that sends data out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        wrong = run(f"port = {server.getsockname()[1]}\n{connect}")
        assert "is refused here" in wrong
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["site-packages", "dist-packages"])
def test_installed_packages_stay_outside(name: str) -> None:
    """Guards against a program that reads or imports what is installed below Python's own library."""
    file = str(Path(inspect.__file__).parent / name / "pip" / "__init__.py")
    assert run(f"open({file!r})") == "PermissionError: open is refused here"
    assert run(f"open({inspect.__file__!r})") == ""


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a secret read from an environment variable, and against answers that depend on installed
    packages.
    """
    monkeypatch.setenv("SECRET", "1")
    assert run("import os\nassert 'SECRET' not in os.environ\nassert 'HOME' not in os.environ") == ""
    assert run("import torch").startswith("ModuleNotFoundError")
    assert run("input()").startswith("EOFError")


def test_what_programs_need_is_there() -> None:
    """Guards against right answers that fail because a standard module is blocked."""
    modules = (
        "bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools"
        " json math operator queue random re statistics string struct typing unicodedata"
    )
    assert run("\n".join(f"import {module}" for module in modules.split())) == ""
    assert run("import hashlib\nassert hashlib.md5(b'').hexdigest().startswith('d41d')") == ""
    assert run("import sys\nsys.setrecursionlimit(10**4)\nf = lambda n: n and f(n - 1)\nf(5000)") == ""
