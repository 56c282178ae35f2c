"""Count the gate's verdicts on equal code and on a planted slowdown, run by run: `python -m perf.trials`.

Each trial is a session of `pytest --benchmark` in a temporary repository, with `ar` and one arm from code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from perf.neighbour import neighbour
from perf.verdicts import verdict_table
from specdecode.bench.gate.baselines import bless, ever_sees
from specdecode.bench.runs.file import read
from specdecode.cli.output import say
from specdecode.support.git import git
from specdecode.support.worktree import import_environment

ENGINE = """
import time

import torch

import specdecode

SLOWER = {slower}


def make(target, draft, device, dtype):
    model = specdecode.load(target, device=device, dtype=dtype).model

    def decode(prompt, count):
        ids, cache = torch.tensor([prompt]), None
        for _ in range(count):
            started = time.perf_counter()
            with torch.inference_mode():
                output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            token = ids.item()
            end = time.perf_counter() + SLOWER * (time.perf_counter() - started)
            while time.perf_counter() < end:
                pass
            yield [token]

    return decode
"""
PRESET = """
prompts = "humaneval:{each},prose:{each}"
max_new_tokens = {tokens}
repeats = 1

[arms]
ar = {{}}
mine = {{ call = "engine:make" }}
"""


def session(folder: Path, slower: float, *arguments: str) -> tuple[str, str, float]:
    """Run one session. Return the verdict on the arm's time, the reason for it, and the session's minutes."""
    (folder / "engine.py").write_text(ENGINE.format(slower=slower))
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark", "--preset=own.toml", "-k", "mine"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--junitxml=junit.xml", "-o", "junit_family=xunit1", "--benchmark-json=run.json", *arguments],
        cwd=folder,
        env=import_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    minutes = (time.monotonic() - started) / 60
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    for test in ET.parse(folder / "junit.xml").iter("testcase"):
        values = {one.attrib["name"]: one.attrib["value"] for one in test.iter("property")}
        if "mine-time" in test.attrib["name"]:
            return values["verdict"], values["reason"], minutes
    raise SystemExit("no verdict on the time of the arm:\n" + done.stdout)


def main() -> None:
    """Print a line for each session, and a table of the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("side-by-side", "by-baseline"))
    parser.add_argument(
        "--runs", type=int, nargs=2, default=(20, 10), help="sessions of equal and of slower code [20 10]"
    )
    parser.add_argument("--slowdown", type=float, default=0.05, help="planted slowdown, as a share [0.05]")
    parser.add_argument("--tolerance", default="0.02", help="tolerance of the gate [0.02]")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each output [16]")
    parser.add_argument("--minutes", type=float, help="minutes of each session [side-by-side 3, by-baseline 10]")
    parser.add_argument("--neighbour", action="store_true", help="another process uses a core a fifth of the time")
    options = parser.parse_args()
    side_by_side = options.kind == "side-by-side"
    minutes = options.minutes or (3.0 if side_by_side else 10.0)
    limits = (f"--until={options.slowdown}", f"--budget-minutes={minutes}", f"--tolerance={options.tolerance}")
    verdicts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name, neighbour(options.neighbour):
        folder = Path(name)
        (folder / "own.toml").write_text(PRESET.format(tokens=options.tokens, each=3 if side_by_side else 6))
        (folder / "engine.py").write_text(ENGINE.format(slower=0.0))
        (folder / ".gitignore").write_text("results\njunit.xml\nrun.json\n__pycache__\n")
        for command in (["init"], ["add", "-A"], ["commit", "-m", "equal"]):
            git("-c", "user.name=trials", "-c", "user.email=trials@example.org", *command, root=folder)
        if not side_by_side:
            session(folder, 0.0, f"--until={options.slowdown / 2}", *limits[1:])
            run = read(folder / "run.json")
            say(f"the baseline sees slowdowns from {ever_sees(run, run.header.tolerance or 0.0):.1%}")
            try:
                bless([folder / "run.json"], folder / "baselines", "equal")
            except ValueError as error:
                raise SystemExit(str(error)) from None
        for label, slower, count in (
            ("equal", 0.0, options.runs[0]),
            (f"{options.slowdown:.0%} slower", options.slowdown, options.runs[1]),
        ):
            for run in range(count):
                verdict, reason, took = session(folder, slower, *limits, *(["--against=HEAD"] if side_by_side else []))
                say(f"{run + 1}/{count} {label}, {took:.1f} min: {verdict}: {reason}")
                verdicts.setdefault(label, Counter())[verdict] += 1
    say("\n" + verdict_table(options.kind, verdicts))


if __name__ == "__main__":
    main()
