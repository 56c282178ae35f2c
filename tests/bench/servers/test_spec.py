"""The table `server` of an arm, and the list of concurrencies in a preset."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.presets import parse, preset
from specdecode.bench.servers.server import Servers
from specdecode.bench.servers.spec import ServerSpec
from specdecode.models.chat import Codec

URL = {"url": "http://127.0.0.1:8000/v1"}
WHOLE_PRESET = 'prompts = "prose"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\n'


@pytest.mark.parametrize(
    ("url", "base", "loopback"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000", True),
        ("http://localhost:8000/", "http://localhost:8000", True),
        ("http://[::1]:8000", "http://[::1]:8000", True),
        ("https://models.example.org/a/v1/", "https://models.example.org/a", False),
        ("http://10.0.0.7:80", "http://10.0.0.7:80", False),
    ],
)
def test_an_address_is_read(url: str, base: str, loopback: bool) -> None:
    """Guards against requests to /v1/v1, and a proxy between this machine and itself."""
    spec = ServerSpec(url=url)
    assert (spec.base_url(1), spec.loopback) == (base, loopback)


@pytest.mark.parametrize(
    "url", ["ftp://localhost/v1", "http:///v1", "http://localhost:80O0", "http://localhost:70000/v1"]
)
def test_an_address_that_cannot_be_asked_is_told(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"server.url is {url!r}: write http://HOST:PORT/v1")):
        ServerSpec(url=url)


def test_a_password_in_an_address_is_refused() -> None:
    """Guards against a password in run files, and in the code that `recommend` prints."""
    with pytest.raises(ValueError, match=r"holds a password, which run files would keep: use server\.api_key"):
        ServerSpec(url="http://user:secret@localhost/v1")


def test_a_key_is_looked_for_when_the_arm_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a run file that can be read only where the server's API key is set, and a key that is stored in
    it.
    """
    entry = {"server": URL | {"api_key": "SERVER_KEY"}}
    spec = ArmSpec.from_record("it", entry)
    servers = Servers({}, Codec(None), tmp_path)
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with pytest.raises(ValueError, match=r"server\.api_key names the environment variable SERVER_KEY, which"):
        make_arm("it", entry, None, None, servers=servers)
    monkeypatch.setenv("SERVER_KEY", "a secret")
    arm = make_arm("it", entry, None, None, servers=servers)
    assert arm.server is not None
    assert arm.server.server.spec.key == "a secret"
    assert "secret" not in repr(spec)
    assert "secret" not in repr(arm.options)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("serve {target} --port {port} --draft {draft}", "names {draft}: name the model with --draft"),
        ("serve {model} --port {port}", r"names {model}: only {target}, {draft} and {port} are filled in"),
    ],
)
def test_a_command_is_not_started_with_a_gap(command: str, reason: str, tmp_path: Path) -> None:
    """Guards against a server that is started with an empty draft model name."""
    servers = Servers({"target": "a folder", "draft": ""}, Codec(None), tmp_path)
    with pytest.raises(ValueError, match=re.escape(reason)):
        make_arm("it", {"server": {"command": command}}, None, None, servers=servers)
    options = command.replace("{draft}", "--options '{\"k\": {}}'").replace("{model}", "{target}")
    assert make_arm("it", {"server": {"command": options}}, None, None, servers=servers).server is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_tokens = 3", "preset 'it.toml' has unknown keys: max_tokens; choose from arms, prompts, max_new_tokens"),
        ("repeats = 3", "preset 'it.toml' lacks arms, prompts, max_new_tokens"),
        ("repeats", "preset 'it.toml' cannot be read: "),
        (WHOLE_PRESET + "ar = 3", "preset 'it.toml', arms: ar is 3: it must be a table"),
        (WHOLE_PRESET.replace("[arms]", "arms = ['ar']"), "preset 'it.toml': arms is ['ar']: it must be a table"),
        (WHOLE_PRESET.replace("1", "'1'"), "preset 'it.toml': repeats is '1': it must be a whole number"),
        (WHOLE_PRESET.replace("8", "0"), "preset 'it.toml': max_new_tokens is 0: it must be at least 1"),
        ("lengths = [4, 0]\n" + WHOLE_PRESET, "preset 'it.toml': lengths is 0: it must be at least 1"),
    ],
)
def test_keys_of_a_preset_are_told(text: str, reason: str) -> None:
    """Guards against Python's own error message for a wrong key in a preset."""
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(text, "it.toml")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.toml"):
        preset("nowhere.toml")


def test_a_list_of_concurrencies_is_an_arm_each() -> None:
    """Guards against a speedup over a baseline that decodes another number of prompts at a time."""
    server = 'server = { url = "http://127.0.0.1:1" }'
    preset = parse(
        "prompts = 'prose:1'\nmax_new_tokens = 8\nrepeats = 1\n[arms]\n"
        f"ar = {{ {server}, concurrency = [1, 4, 16] }}\n"
        f"eagle = {{ {server}, concurrency = [1, 4] }}\n"
        f"plain = {{ {server}, baseline = 'eagle', concurrency = [1, 4, 16] }}\n"
        f"one = {{ {server}, concurrency = 4 }}\n",
        "it",
    )
    found = {arm: (entry["concurrency"], entry.get("baseline")) for arm, entry in preset.arms.items()}
    assert found == {
        "ar": (1, None),
        "ar-c4": (4, None),
        "ar-c16": (16, None),
        "eagle": (1, None),
        "eagle-c4": (4, "ar-c4"),
        "plain": (1, "eagle"),
        "plain-c4": (4, "eagle-c4"),
        "plain-c16": (16, "eagle"),
        "one": (4, None),
    }


def test_an_empty_list_of_concurrencies_is_told() -> None:
    """Guards against an arm that silently disappears."""
    with pytest.raises(ValueError, match=r"arm .ar.: concurrency is \[\]: name at least one number of prompts"):
        parse("prompts = ''\nmax_new_tokens = 8\nrepeats = 1\n[arms]\nar = { concurrency = [] }", "it")
