"""MTP layers and Medusa heads by name: in an arm, in its code snippet, and on the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specdecode import load
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.snippet import code_snippet
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.heads import MTP_FAMILIES, write_medusa, write_mtp
from tests.helpers.speed_runs import OUTPUT_TOKENS, speed_arm, speed_run

TEXT = "Once upon a time"
TREE: dict[str, Any] = {"shape": "static", "branching": [2, 2]}

Named = tuple[str, dict[str, Any]]
"""The folder of a target, and the entry of an arm that drafts for it."""


@pytest.fixture(scope="module", params=[*MTP_FAMILIES, "medusa"])
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Named:
    folder = tmp_path_factory.mktemp("target")
    if request.param in MTP_FAMILIES:
        return str(write_mtp(request.param, folder)), {"drafter": "mtp"}
    heads = tmp_path_factory.mktemp("heads")
    write_medusa(heads)
    return str(save(folder)), {"drafter": "medusa", "head": str(heads)}


@pytest.mark.parametrize("shape", [{"k": 3}, TREE], ids=["chain", "tree"])
def test_the_lines_of_an_arm_decode_as_it_did(named: Named, shape: dict[str, Any]) -> None:
    """Guards against an entry that does not reach the draft, and a code snippet of another configuration."""
    folder, entry = named
    options = entry | shape
    target = load(folder, device="cpu", dtype="float32", backend="eager")
    ar, made = (
        make_arm("arm", one, target, None, "eager").run(target.encode(TEXT), OUTPUT_TOKENS, ()) for one in ({}, options)
    )
    assert made.tokens == ar.tokens
    # A tree of two levels with two branches each, or a chain of three: check depth and width.
    deepest = len(shape.get("branching", "abc"))
    assert max(depth for depth, steps in enumerate(made.histograms.depth) if steps) == deepest
    assert made.counts.drafted > (deepest + 1) * (made.histograms.depth[deepest] if shape is TREE else 0)
    pasted: dict[str, Any] = {}
    exec(
        code_snippet(speed_run(identity=("abacus", folder, "", "float32"), arm=speed_arm(1.0, options)), "arm"), pasted
    )
    result = pasted["result"]
    assert result.tokens == made.tokens[: len(result.tokens)]
    assert (result.drafted, result.accepted) == (made.counts.drafted, made.counts.accepted)


def test_the_command_line_drafts_with_it(
    named: Named, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against an option that does not reach the draft."""
    folder, entry = named
    arguments = ["generate", TEXT, "--target", folder, "--dtype", "float32", "--max-new-tokens", "16", "--json"]
    told = []
    for options in (["none"], [entry["drafter"], *(["--head", entry["head"]] if "head" in entry else [])]):
        assert exit_code(monkeypatch, *arguments, "--drafter", *options) == 0
        told.append(json.loads(capfd.readouterr().out))
    plain, drafted = told
    assert drafted["text"] == plain["text"]
    assert plain["acceptance_rate"] is None
    assert drafted["acceptance_rate"] is not None
