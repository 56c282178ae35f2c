"""A target whose weights are split between two processes: the tokens are those of one process, whatever the drafter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from specdecode import FixedK, ModelDrafter, StaticTree, UnsupportedModelError, generate, load
from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.report.captions import command
from specdecode.bench.runs.file import read
from specdecode.core.errors import ModelFileError
from specdecode.models import tensor_parallel
from specdecode.models.tensor_parallel import check_heads, split_count
from specdecode.policies import policy
from tests.helpers import families
from tests.helpers.characters import save
from tests.helpers.heads import write_head
from tests.helpers.models import lm, prompt
from tests.helpers.root import ROOT

LENGTH = 24

_EACH = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
from specdecode import (
    AdaptiveK, BestFirstTree, Cascade, CostAware, FixedK, HeadDrafter, ModelDrafter, PromptLookup, Sampling, StaticTree,
    UniversalDrafter, generate, generate_batch, load, load_head, measure_costs,
)
from specdecode.controllers.base import Limit
from specdecode.core.errors import SpecDecodeError
from specdecode.policies import policy

folder, head, planless, length, *tokens = *sys.argv[1:4], *map(int, sys.argv[4:])
# Processes that have parted wait for each other.
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
target = load(folder, dtype="float64", tp="auto")
draft = load(folder, dtype="float64", target=target)
layers = load("layers:0-1", target=target)
told = {"backend": str(target.with_backend("auto").backend)}


def decoded(drafter=None, controller=FixedK(4), **others):
    chosen = {} if drafter is None else {"drafter": drafter, "controller": controller}
    result = generate(target, tokens, max_new_tokens=length, **chosen, **others)
    counts.append((result.accepted, result.drafted))
    return result.tokens


class ByTheClock:
    k = 3

    def limit(self):
        return Limit(self.k)

    def observe(self, step):
        self.k = 1 + int(1e9 * step.total_s) % 5


counts = []
trained = load_head(head, target)
told["exact"] = {
    "ar": decoded(),
    "lookup": decoded(PromptLookup(1)),
    "adaptive": decoded(ModelDrafter(draft), AdaptiveK()),
    "tree": decoded(ModelDrafter(layers, StaticTree((2, 2)))),
    "best-first": decoded(ModelDrafter(layers, BestFirstTree(8, 0.01))),
    "head": decoded(Cascade(PromptLookup(2), HeadDrafter(trained, StaticTree((2, 1))))),
    "universal": decoded(UniversalDrafter(target, draft)),
    # Drafts that depend on the clock are of one length in both processes, or their forwards would not meet.
    "by the clock": decoded(ModelDrafter(layers), ByTheClock()),
    "cost-aware": decoded(ModelDrafter(layers), CostAware(measure_costs(target, ModelDrafter(layers)))),
}
told["counts"] = dict(zip(told["exact"], counts))
told["batch"] = [
    result.tokens
    for result in generate_batch(
        target, [tokens, tokens[3:], tokens[:5]], drafter=lambda: ModelDrafter(draft), max_new_tokens=length
    )
]
told["policies"] = {
    name: decoded(PromptLookup(1), policy=policy(name, 20)) for name in ("sink-window", "key-norm", "heavy-hitter")
}
# No seed is given, and both processes draw the same.
told["sampled"] = decoded(ModelDrafter(layers), sampling=Sampling(1.0))
random = load("shape:tiny", dtype="float64", tp="auto")
told["random"] = generate(random, tokens, max_new_tokens=length).tokens
for wrong in (
    lambda: load(planless, tp="auto"),
    lambda: target.quantized("int8"),
    lambda: target.with_backend("packed"),
):
    try:
        wrong()
    except (SpecDecodeError, ValueError) as error:
        told.setdefault("refused", []).append(str(error))
everyone = [None, None]
dist.all_gather_object(everyone, told | {"bytes": target.weight_bytes})
if dist.get_rank() == 0:
    print(json.dumps(everyone))
dist.destroy_process_group()
"""


def run_twice(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes that can communicate."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*torchrun, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def test_two_processes_decode_as_one(model: Path, tmp_path: Path) -> None:
    """Guards against tokens that depend on the split of the weights, processes that draw or draft differently, and
    policies that evict by one process's view.
    """
    alone = load(str(model), dtype="float64", device="cpu", backend="eager")
    head = write_head(alone, tmp_path)
    planless = save(tmp_path / "planless", "gpt-2")
    arguments = [str(model), str(head), str(planless), str(LENGTH), *map(str, prompt())]
    done = run_twice("--no-python", sys.executable, "-c", _EACH, *arguments)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    # The parts of the vocabulary differ in size.
    parts = [one.pop("bytes") for one in (first, second)]
    assert max(parts) < alone.weight_bytes < sum(parts)
    assert first == second
    assert first["backend"] == "eager (split among 2 processes)"
    expected: dict[str, Any] = {"max_new_tokens": LENGTH}
    greedy = generate(alone, prompt(), **expected).tokens
    assert first["exact"] == dict.fromkeys(first["exact"], greedy)
    for name in ("adaptive", "universal"):  # their draft is the target
        accepted, drafted = first["counts"][name]
        assert accepted == drafted > 0
    layers = ModelDrafter(alone.subset([0, 1]), StaticTree((2, 2)))
    tree = generate(alone, prompt(), drafter=layers, controller=FixedK(4), **expected)
    assert first["counts"]["tree"] == [tree.accepted, tree.drafted]
    assert 0 < tree.accepted < tree.drafted
    assert first["batch"] == [
        generate(alone, text, **expected).tokens for text in (prompt(), prompt()[3:], prompt()[:5])
    ]
    for name, tokens in first["policies"].items():
        assert tokens == generate(alone, prompt(), policy=policy(name, 20), **expected).tokens, name
    assert len({tuple(tokens) for tokens in first["policies"].values()}) == 3
    random = load("shape:tiny", dtype="float64", device="cpu", backend="eager")
    assert first["random"] == generate(random, prompt(), **expected).tokens
    no_plan, quantised, other_backend = first["refused"]
    assert "cannot load" in no_plan
    assert "GPT2LMHeadModel" in no_plan
    assert "cannot be quantised: its weights are split among processes" in quantised
    assert "cannot be given another backend: its weights are split among processes" in other_backend


def test_the_suite_measures_once_and_reports_once(tmp_path: Path) -> None:
    """Guards against processes that choose the next or repeated measurements separately, and a file or a table from
    each of them.
    """
    file = tmp_path / "run.json"
    measure = ["--benchmark", "--tp", "auto", "--preset", "multi-gpu", "-k", "linear-k3 or streaming", "--tiny"]
    measure += ["--until=50%", "--budget-minutes=0.03"]
    files = [f"--benchmark-json={file}", "--junitxml=run.xml"]
    done = run_twice("-m", "pytest", "-p", "no:cacheprovider", *measure, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test session starts") == 1
    assert done.stdout.count("No baseline for this hardware") == 1
    run = read(file)
    assert run.header.identity.hardware.endswith("-x2")
    assert (run.header.processes, run.header.on_gpu) == (2, False)
    arms = ("ar", "linear-k3-a80", "streaming-k5-a80-256")
    assert {name: (record.bugs, record.ties) for name, record in run.arms.items()} == dict.fromkeys(arms, (0, 0))
    assert "tp='auto'" in code_snippet(run, "linear-k3-a80")
    assert "torchrun --nproc-per-node=2 -m pytest --benchmark" in command(run)
    assert not list((tmp_path / "results").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tp": "two"}, "tp is 'two': 'auto' splits the weights among all processes of torchrun"),
        ({"tp": "auto", "quantize": "int8"}, "quantize='int8' is for weights that one process holds"),
        (
            {"tp": "auto", "backend": "compile"},
            "split weights run on the backend eager only, and 'compile' is asked for",
        ),
        ({"tp": "auto", "name": "layers:0-1"}, "'layers:0-1' shares the weights of its target"),
    ],
)
def test_what_split_weights_do_not_permit(
    given: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a model that is loaded before it is refused."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(**{"name": "./nowhere", **given})


def test_a_number_of_processes_that_cannot_share_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against PyTorch's own errors: of views whose sizes do not fit, or of a GPU that is not there."""
    cases = {
        "3": (str(model), "4 attention heads, and 2 of keys"),
        "2": ("shape:smollm2-135m", "9 attention heads, and 3"),
    }
    for count, (name, heads) in cases.items():
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match=f"{count} processes cannot share {heads}"):
            load(name, dtype="float64", device="cpu", tp="auto")
    with pytest.raises(ValueError, match="2 processes cannot share 4 attention heads, and 1 of keys"):
        check_heads(families.build("gemma4_unified_text").config, 2)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelFileError, match="cannot load"):
        load(str(tmp_path), dtype="float64", device="cpu", tp="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    cudnn: list[bool] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    for rank in ("1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with nullcontext() if rank == "1" else pytest.raises(ValueError, match="process 3 on a machine with 2 GPUs"):
            assert split_count("auto", "shape:tiny", None, "auto") == 2
    assert chosen == [1]
    assert cudnn == [False]


def test_what_transformers_cannot_split_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback from inside transformers, and against the name of no model or version."""
    model = lm("llama").model

    def refuse(*of: object) -> None:
        raise NotImplementedError("no plan\nfor this")

    monkeypatch.setattr(tensor_parallel, "_config", lambda count: None)
    monkeypatch.setattr(type(model), "prepare_distribute_model", refuse, raising=False)
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM cannot be split among 2 processes: no plan$"):
        tensor_parallel.split(model, 2)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers.distributed.configuration_utils", None)
    with pytest.raises(ValueError, match=r"this version of transformers cannot split weights: install 5\.18 or later"):
        tensor_parallel.split(model, 2)


def test_without_torchrun_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model that is complete in each process, though a split was requested."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="tp='auto' splits the weights among the processes of torchrun"):
        load("./nowhere", tp="auto")
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = load("shape:tiny", dtype="float64", device="cpu", tp="auto")
    assert model.ranks.group is None
