"""A server that the suite starts: it ends with the suite, and its last words are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from specdecode.bench.servers import keeper as keeping
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.process import words_of
from specdecode.bench.servers.server import Server, Servers
from specdecode.bench.servers.spec import ServerSpec
from specdecode.models.chat import Codec
from tests.helpers.root import ROOT
from tests.helpers.suites import start_python

FAKE = ROOT / "tests" / "helpers" / "fake_server.py"
COMMAND = f"{sys.executable} {FAKE} --port {{port}}"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Return the servers of a session."""
    servers = Servers({"target": "a folder", "draft": ""}, Codec(None), tmp_path)
    yield servers
    for server in servers._servers.values():
        server.close()


def fakes(parent: int | None = None) -> list[psutil.Process]:
    """Return the fake engines that run below a process."""
    below = psutil.Process(parent).children(recursive=True)
    return [one for one in below if str(FAKE) in one.cmdline() and "keeper.py" not in " ".join(one.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_a_server_is_started_asked_and_ended(servers: Servers, tmp_path: Path) -> None:
    """Guards against a server that outlives its session, and against a log that nobody finds."""
    server = servers.server("spec", ServerSpec(command=COMMAND))
    assert not server.is_open
    assert server.generate([[1, 2, 3]], 8, 1, 30).outputs
    running = fakes()
    assert len(running) == 1
    assert (tmp_path / "spec.log").read_text().splitlines()[1] == "loading"
    server.close()
    assert gone(running)
    assert server.generate([[1, 2, 3]], 8, 1, 30).outputs, "it is started again when it is needed again"


def test_arms_of_the_same_table_share_a_server(servers: Servers) -> None:
    """Guards against starting one server for each concurrency."""
    spec = ServerSpec(command=COMMAND)
    assert servers.server("ar", spec) is servers.server("ar-c4", ServerSpec(command=COMMAND))
    assert servers.server("ar", spec) is not servers.server("spec", ServerSpec(command=f"{COMMAND} --k 3"))


def test_servers_that_run_alone_make_room(servers: Servers) -> None:
    """Guards against two models loaded into a memory that holds one."""
    one = servers.server("one", ServerSpec(command=COMMAND, alone=True))
    two = servers.server("two", ServerSpec(command=f"{COMMAND} --k 3", alone=True))
    beside = servers.server("beside", ServerSpec(command=f"{COMMAND} --k 2"))
    beside.open()
    one.open()
    two.open()
    assert (one.is_open, two.is_open, beside.is_open) == (False, True, True)
    assert len(fakes()) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--fault fails", "its server ended with exit code 1; it said: ValueError: memory is too small (full log: "),
        (
            "--fault 'ends at once'",
            "its server ended with exit code 1; it said: loading / CUDA out of memory (full log: ",
        ),
        (
            "--fault 'never ready'",
            "its server is not ready after 0.02 minutes, its start_minutes; it said: loading (full log: ",
        ),
        ("--fault die", "its server ended with exit code -9; it said: loading (full log: "),
        (
            "--unhealthy",
            "its server answers /health with 404, though it lists its models: set server.ready to a path it has",
        ),
    ],
)
def test_what_ends_a_server_is_told(servers: Servers, options: str, said: str) -> None:
    """Guards against the message "connection refused" instead of the reason why the server ended, and against minutes
    until a path is reported that the server does not have.
    """
    minutes = 0.02 if "never ready" in options else 1.0
    spec = ServerSpec(command=f"{COMMAND} --after 3 {options}", start_minutes=minutes)
    with pytest.raises(ServerError) as raised:
        servers.server("spec", spec).generate([[1, 2, 3]], 8, 1, 30)
    assert str(raised.value).startswith(said)


def test_a_command_that_is_not_there_is_told(servers: Servers) -> None:
    """Guards against a traceback of the process that supervises the server."""
    with pytest.raises(ServerError, match=r"its server cannot be started: no-such-program: No such file or directory$"):
        servers.server("spec", ServerSpec(command="no-such-program --port {port}")).open()


SUITE = f"""
import signal, sys, time
from pathlib import Path
from specdecode.bench.servers.server import Server
from specdecode.bench.servers.spec import ServerSpec
from specdecode.models.chat import Codec
# Of two processes, as engines are that have workers.
command = "sh -c '{COMMAND} & {COMMAND.replace("{port}", "0")}; wait'"
server = Server(ServerSpec(command=command), {{}}, Codec(None), Path(sys.argv[1]))
try:
    server.open()
    print("open", flush=True)
    time.sleep(60)
finally:
    server.close()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_a_server_outlives_the_suite(number: signal.Signals, tmp_path: Path) -> None:
    """Guards against a server that occupies the GPU after a run was cancelled."""
    suite = start_python(SUITE, str(tmp_path / "server.log"))
    deadline = time.monotonic() + 20
    while suite.output() != "open\n":
        assert not suite.ended()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while len(running := fakes(suite.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(suite.pid, number)
    assert gone(running)
    suite.wait()


def test_what_ignores_the_first_signal_is_killed_though_nobody_listens(tmp_path: Path) -> None:
    """Guards against an engine's workers that stay on the GPU after the suite was killed."""
    command = ["sh", "-c", "(trap '' TERM; exec sleep 61) & exit 0"]
    keeper = subprocess.Popen(
        [sys.executable, "-I", keeping.__file__, str(tmp_path / "log"), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert keeper.stdout is not None
    keeper.stdout.close()
    keeper.wait(20)
    assert keeper.stdin is not None
    keeper.stdin.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(keeper.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(keeper.pid, signal.SIGKILL)
    pytest.fail("a process of the server is still there")


def test_placeholders_are_filled_in_word_by_word() -> None:
    """Guards against JSON braces taken for placeholders, and a folder name that is split at its space."""
    command = """serve {target} --port {port} --config '{"model": "{draft}", "n": {"a": 1}}'"""
    words = words_of(command, {"target": "a folder", "draft": "b", "port": 80})
    assert words == ["serve", "a folder", "--port", "80", "--config", '{"model": "b", "n": {"a": 1}}']


def test_nobody_else_is_asked_for_the_pids(servers: Servers) -> None:
    """Guards against a server's own work counted as a disturbance by others."""
    server = servers.server("spec", ServerSpec(command=COMMAND))
    server.open()
    (running,) = fakes()
    port = running.cmdline()[-1]
    found = Server(ServerSpec(url=f"http://127.0.0.1:{port}/v1"), {}, Codec(None), Path("none.log"))
    assert list(found.pids) == [running.pid]
    assert not server.pids, "it is this process's own child"


@pytest.mark.parametrize(
    ("url", "port"), [("https://localhost/v1", 443), ("http://localhost", 80), ("https://localhost:8443", 8443)]
)
def test_the_port_of_an_address_is_its_scheme_s(url: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against another server's processes taken for those of a server behind TLS."""
    monkeypatch.setattr("specdecode.bench.servers.process.listeners", lambda asked: [asked])
    assert Server(ServerSpec(url=url), {}, Codec(None), Path("none.log")).pids == [port]
