"""Contain a program from inside its own process. This file runs as a script, twice.

`contained.run` starts it. The first run gives up rights that only the kernel can remove, and starts the second. The
second run sets limits, installs the audit hook, and runs the program.
"""

from __future__ import annotations

import json
import os
import posix
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

_UNPRIVILEGED = 0x10000000 | 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
# Landlock's rights that change files or folders (bits 1, 4 to 12), and rights that later versions added.
_CHANGE_FILES, _MOVE_FILES, _TRUNCATE_FILES = 0x1FF2, 1 << 13, 1 << 14

_READ_ONLY = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
# Audit events that have no effect outside the process (PEP 578; "Audit events table" of the Python manual).
_HARMLESS = frozenset(
    str.split(
        "array.__new__ builtins.id builtins.input builtins.input/result code.__new__ compile exec function.__new__"
        " marshal.dumps marshal.load marshal.loads object.__delattr__ object.__getattr__ object.__setattr__"
        " os.listdir os.putenv os.scandir os.unsetenv pickle.find_class shutil.rmtree sys._getframe"
        " sys._getframemodulename sys.excepthook sys.unraisablehook tempfile.mkdtemp tempfile.mkstemp time.sleep"
    )
)
# Events of changes to files, and the number of their arguments that are paths.
_CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.truncate": 1}
# Modules in C that only compute. Modules in Python are allowed: they can do no more than these.
_COMPUTING = frozenset(
    str.split(
        "_abc _ast _bisect _blake2 _codecs _collections _contextvars _csv _datetime _decimal _functools _hashlib _heapq"
        " _hmac _io _json _locale _md5 _opcode _operator _pickle _queue _random _sha1 _sha2 _sha256 _sha3 _sha512"
        " _signal _sre _stat _statistics _string _struct _suggestions _symtable _thread _tokenize _tracemalloc _types"
        " _typing _warnings _weakref _zoneinfo array atexit binascii cmath errno gc itertools marshal math pwd time"
        " unicodedata zlib"
    )
)
# Functions of Python's `os` that raise no audit event. They are removed.
_SILENT = str.split(
    "chroot mkfifo mknod pidfd_open posix_openpt sched_setaffinity sched_setparam sched_setscheduler setns setpriority"
    " unshare"
)


def seal(folder: str) -> None:
    """Take rights from this process, as far as the kernel supports it (unshare(2), prctl(2), landlock(7)).

    Afterwards it has no network and no privileges, ends with its parent, and can change files in one folder only.

    Args:
        folder: the folder in which files may be changed.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    libc.unshare(_UNPRIVILEGED)
    libc.prctl(_DIE_WITH_PARENT, 9)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    files = _CHANGE_FILES | _MOVE_FILES * (version >= 2) | _TRUNCATE_FILES * (version >= 3)
    # Also refused: TCP connections, and signals and sockets to processes that are not sealed.
    rules = struct.pack("=QQQ", files, 3 * (version >= 4), 3 * (version >= 6))
    ruleset = libc.syscall(_CREATE_RULESET, rules, len(rules), 0)
    beneath = struct.pack("=Qi", files, os.open(folder, os.O_PATH))
    libc.syscall(_ADD_RULE, ruleset, 1, beneath, 0)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)


def limit(limits: dict[str, Any]) -> None:
    """Set the kernel's limits on this process (setrlimit(2)). A privileged process may still start processes."""
    for what, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def guard(folder: str, changes: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook. It lets a program compute, read Python's own library, and change files in its working
    folder. It refuses every other event, known to this file or not.

    Args:
        folder: folder in which files may be changed.
        changes: most changes, including files opened for writing. With the size limit of a file, this bounds the
            written bytes.
    """
    # Local names, which a program cannot replace as it could replace the builtins.
    exact, text = type, str
    working_folder, library = f"{folder}/", tuple(f"{entry}/" for entry in sys.path)
    # Installed packages lie below the library, and are no part of it.
    outside = frozenset(("..", "site-packages", "dist-packages"))
    left = [changes]

    def within(path: Any, *folders: str) -> bool:
        """Return whether a path lies in the folders, from its name alone. That is enough: the working folder has no
        links, and stays the working folder."""
        if exact(path) is not text or not outside.isdisjoint(path.split("/")):
            return False
        return path.startswith(folders) or not path.startswith("/")

    def allowed(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = arguments
            if flags & ~_READ_ONLY == 0:
                # Without a mode the event is os.open(), which also opens folders, and then files relative to them.
                return within(path, working_folder, *library) if mode is not None else within(path, working_folder)
            left[0] -= 1
            return left[0] >= 0 and within(path, working_folder)
        if event in _CHANGES:
            left[0] -= 1
            return left[0] >= 0 and all(within(path, working_folder) for path in arguments[: _CHANGES[event]])
        return event in _HARMLESS

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            name, file = arguments[:2]
            if (name in sys.builtin_module_names or file is not None) and not (
                name in _COMPUTING and (file is None or within(file, *library))
            ):
                raise ImportError(f"the module {name} is refused here")
        elif not allowed(event, arguments):
            raise PermissionError(f"{event} is refused here")

    return hook


def main() -> None:
    instructions = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program, token, limits = instructions["program"], instructions["token"], instructions["limits"]
    write, leave = os.write, os._exit
    for name in _SILENT:
        for module in (os, posix):
            module.__dict__.pop(name, None)
    limit(limits)
    sys.addaudithook(guard(os.getcwd(), limits["changes"]))
    wrong = ""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        wrong = " ".join(f"{type(error).__name__}: {error}"[: limits["reason_characters"]].split())
    write(1, f"\n{token} {wrong}\n".encode(errors="replace"))
    leave(0)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        if sys.platform == "linux":
            seal(os.getcwd())
        os.execv(sys.executable, [*sys.orig_argv, "sealed"])
    main()
