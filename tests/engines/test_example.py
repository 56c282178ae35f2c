"""The example with vLLM: read here, and run with another target and options by `test_vllm`."""

from __future__ import annotations

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.presets import preset
from specdecode.bench.servers.process import words_of
from tests.helpers.root import ROOT


def test_the_example_starts_servers_that_differ_in_speculation_alone() -> None:
    """Guards against an example preset that can no longer be read, and a baseline server that differs in more than
    speculation.
    """
    chosen = preset(str(ROOT / "examples" / "vllm.toml"))
    chosen.check_baselines()
    arms = {name: ArmSpec.from_entry(name, entry) for name, entry in chosen.arms.items()}
    assert {name: (arm.concurrency, arm.baseline) for name, arm in arms.items()} == {
        "ar": (1, None),
        "ar-c4": (4, None),
        "ngram": (1, None),
        "ngram-c4": (4, "ar-c4"),
    }
    tables = {name: arm.server for name, arm in arms.items() if arm.server is not None}
    plain, speculating = (words_of(tables[name]["command"], {"target": "t", "port": 1}) for name in ("ar", "ngram"))
    assert speculating[: len(plain)] == plain
    assert speculating[len(plain) :: 2] == ["--per-request-spec-decode-metrics", "--speculative-config"]
