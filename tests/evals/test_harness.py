"""lm-evaluation-harness over the decode path: the model "specdecode", on tiny models and local tasks.

The harness brings 340 MB of packages that nothing else here needs, so these tests have an environment of their own:
`tox -e harness`.
"""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from specdecode import (
    LM,
    BestFirstTree,
    Cascade,
    Chain,
    HeadDrafter,
    PromptLookup,
    Sampling,
    SpecDecodeError,
    StaticTree,
    generate,
)
from specdecode.controllers.base import FixedK
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.evals.harness import SpecDecodeLM
from specdecode.evals.perplexity import negative_log_likelihoods
from specdecode.evals.quality_presets import make_decode_path
from specdecode.policies import policy as named_policy
from tests.helpers import models
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.heads import write_head
from tests.helpers.spelling import characters

TEXT = "".join(chr(33 + 29 * i * i % 90) for i in range(700))
TEMPLATE = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def tokenizer(end: str = "~") -> PreTrainedTokenizerFast:
    """Return a tokenizer with an end-of-text token: the harness starts a text without a context with it."""
    made = characters()
    made.eos_token = end
    return made


@cache
def target() -> LM:
    model = models.build(models.ARCHITECTURES["llama"] | {"eos_token_id": None})
    return LM(model, tokenizer(), name="a/tiny")


def written(prompt: str, length: int, **rules: Any) -> str:
    """Return the text that `generate` writes, as a reader sees it."""
    ends = [target().tokenizer.eos_token_id]
    tokens = generate(target(), target().encode(prompt), max_new_tokens=length, stop_token_ids=ends, **rules).tokens
    return target().tokenizer.decode([token for token in tokens if token not in ends], skip_special_tokens=True)


def harness(**arguments: Any) -> SpecDecodeLM:
    return SpecDecodeLM(target(), backend="eager", **arguments)


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def likelihood(tokens: list[int], count: int) -> float:
    """Return the log-probability of the last tokens by one forward of transformers, without a cache."""
    logprobs = models.logits(target().model, tokens[:-1]).double().log_softmax(-1)
    own = torch.tensor(tokens[-count:], device=logprobs.device)
    return logprobs[-count:].gather(1, own[:, None]).sum().item()


# Likelihoods.


PAIRS = [("a context", " and more"), ("", "no context"), ("it ends with a space ", "x"), (TEXT[:300], TEXT[300:340])]


@pytest.mark.parametrize("k", [1, 5])
def test_likelihoods_are_those_of_one_forward(k: int) -> None:
    """Guards against a continuation that is scored one token off, and steps that see another text."""
    greedy = target().decode(models.continuation(target().model, target().encode("Go on"), 8))
    pairs = [*PAIRS, ("Go on", greedy)]
    found = harness(k=k).loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    ends = target().tokenizer.eos_token_id
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        tokens = target().encode(context) or [ends]
        count = len(continuation) + len(context) - len(context.rstrip())
        assert logprob == pytest.approx(likelihood([*tokens, *target().encode(continuation)], count), abs=1e-6)
    assert [is_greedy for _, is_greedy in found] == [False] * len(PAIRS) + [True]


def test_a_policy_changes_the_likelihood_of_what_it_has_forgotten() -> None:
    """Guards against a cache policy that is judged by a prefill, which does not touch the cache."""
    short, long = asked("loglikelihood", "short", " text"), asked("loglikelihood", TEXT[:300], TEXT[300:340])
    whole = [logprob for logprob, _ in harness().loglikelihood([short, long], disable_tqdm=True)]
    bounded = harness(policy="sink-window", cache=64)
    found = [logprob for logprob, _ in bounded.loglikelihood([short, long], disable_tqdm=True)]
    assert found[0] == pytest.approx(whole[0], abs=1e-9)
    assert abs(found[1] - whole[1]) > 0.1
    path = make_decode_path("it", {"policy": "sink-window", "cache": 64}, target(), 5, "eager")
    tokens = target().encode(TEXT[:340])
    assert found[1] == pytest.approx(-negative_log_likelihoods(path, tokens)[-40:].sum().item(), abs=1e-9)
    sinks = harness(policy="sink-window", cache=64, sinks=0)
    assert abs(sinks.loglikelihood([long], disable_tqdm=True)[0][0] - found[1]) > 0.1


def test_long_texts_are_read_in_windows_or_with_a_policy_in_one() -> None:
    """Guards against tokens that no window scores or two do, and a bounded cache that is emptied at the
    windows' edges.
    """
    tokens, first = target().encode(TEXT), target().tokenizer.eos_token_id
    (found,) = harness().loglikelihood_rolling([asked("loglikelihood_rolling", TEXT)], disable_tqdm=True)
    window = target().context_length
    rest = len(TEXT) - (window - 1)
    expected = likelihood([first, *tokens[: window - 1]], window - 1) + likelihood(tokens[-window:], rest)
    assert found == pytest.approx(expected, abs=1e-6)
    bounded = harness(policy="sink-window", cache=64)
    (found,) = bounded.loglikelihood_rolling([asked("loglikelihood_rolling", TEXT)], disable_tqdm=True)
    path = make_decode_path("it", {"policy": "sink-window", "cache": 64}, target(), 5, "eager")
    assert found == pytest.approx(-negative_log_likelihoods(path, [first, *tokens]).sum().item(), abs=1e-9)
    assert bounded.loglikelihood_rolling([asked("loglikelihood_rolling", "")], disable_tqdm=True) == [0.0]


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    """Guards against a task that fails because one context is too long, and a continuation that is cut instead."""
    context, continuation = TEXT[:600], TEXT[600:620]
    request = asked("loglikelihood", context, continuation)
    kept = target().encode(context + continuation)[-target().context_length :]
    ((found, _),) = harness().loglikelihood([request], disable_tqdm=True)
    assert found == pytest.approx(likelihood(kept, len(continuation)), abs=1e-6)
    (text,) = harness().generate_until([asked("generate_until", context, {"max_gen_toks": 12})], disable_tqdm=True)
    assert text == written(context[-(target().context_length - 12) :], 12)


# Texts.


@pytest.mark.parametrize(
    "way",
    [
        {"drafter": "none"},
        {},
        {"draft": "layers:0-1", "k": 3},
        {"draft": "layers:0-1", "shape": "static", "branching": [2, 1], "controller": "adaptive"},
        {"draft": "layers:0-1", "drafter": "lookup+model", "ngram": 2, "shape": "best-first", "nodes": 6},
        {"draft": "layers:0-1", "drafter": "universal"},
        {"drafter": "self-streaming", "draft_cache": 32, "controller": "cost-aware"},
        {"drafter": "lookup", "policy": "sink-window", "cache": 32, "sinks": 2},
        {"policy": "sink-window", "cache": 32},
        {"policy": "key-norm", "cache": 32, "drafter": "none"},
    ],
    ids=str,
)
def test_texts_are_those_of_generate(way: dict[str, Any]) -> None:
    """Guards against a drafter, a cache or a stop string that does not reach the decoder."""
    settings = {"sinks": way["sinks"]} if "sinks" in way else {}
    rules = {"policy": named_policy(way["policy"], way["cache"], **settings)} if "policy" in way else {}
    text = written(TEXT[:60], 40, **rules)
    assert len(set(text)) > 10
    stop = text[20]
    contexts = [
        asked("generate_until", TEXT[:60], {"until": until, "max_gen_toks": 40, "do_sample": False})
        for until in ([], ["not in it"], [stop, ""], stop)
    ]
    found = harness(**way).generate_until(contexts, disable_tqdm=True)
    cut = text[: text.index(stop)]
    assert found == [text, text, cut, cut]


def test_a_stop_string_that_begins_in_the_context_ends_nothing() -> None:
    """Guards against answers that end at once because the context ends with a part of the stop string."""
    text = written(TEXT[:60], 30)
    seam, inner = TEXT[59] + text[0], text[19:21]
    request = asked("generate_until", TEXT[:60], {"until": [seam, inner], "max_gen_toks": 30, "do_sample": False})
    assert seam not in text
    assert harness().generate_until([request], disable_tqdm=True) == [text[: text.index(inner)]]


@pytest.mark.parametrize(
    ("way", "drafters", "shape"),
    [
        ({}, [PromptLookup, HeadDrafter], BestFirstTree(7, 0.05)),
        ({"drafter": "head", "shape": "chain"}, [HeadDrafter], Chain()),
        ({"drafter": "head", "shape": "static", "k": 3}, [HeadDrafter], StaticTree((2, 2, 2))),
        ({"drafter": "lookup+head", "nodes": 5, "threshold": 0.1}, [PromptLookup, HeadDrafter], BestFirstTree(5, 0.1)),
    ],
    ids=str,
)
def test_texts_are_drafted_by_a_head(
    tmp_path: Path, way: dict[str, Any], drafters: list[type], shape: TreeShape
) -> None:
    """Guards against a head that is given and not used, or used in another cascade or tree than requested."""
    model = harness(head=str(write_head(target(), tmp_path)), **way)
    drafter = model._make_drafter()
    parts = list(drafter.drafters) if isinstance(drafter, Cascade) else [drafter]
    assert [type(part) for part in parts] == drafters
    assert parts[-1].shape == shape
    request = asked("generate_until", TEXT[:60], {"max_gen_toks": 40})
    assert model.generate_until([request], disable_tqdm=True) == [written(TEXT[:60], 40)]


def test_sampling_is_seeded_by_the_harness() -> None:
    """Guards against a temperature that is ignored, and a run that the harness's --seed cannot repeat."""
    rules = {"max_gen_toks": 30, "do_sample": True, "temperature": 3.0, "top_p": 0.9, "top_k": 40}
    requests = [asked("generate_until", TEXT[:60], rules)] * 2

    def sampled(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return harness(drafter="none").generate_until(requests, disable_tqdm=True)

    first = sampled(1)
    assert sampled(1) == first
    assert len({*first, *sampled(2)}) == 4
    torch.manual_seed(1)
    sampling = Sampling(3.0, 40, 0.9, seed=int(torch.randint(2**31, ())))
    assert first[0] == written(TEXT[:60], 30, sampling=sampling)
    with pytest.raises(ValueError, match="'num_beams', which this model does not support"):
        harness().generate_until([asked("generate_until", "a", {"num_beams": 4})], disable_tqdm=True)


def test_a_text_ends_at_the_models_stop_tokens() -> None:
    """Guards against answers that continue past their stop token, or that contain it."""
    text = written(TEXT[:60], 40)
    ending = SpecDecodeLM(LM(target().model, tokenizer(text[20])), backend="eager")
    found = ending.generate_until([asked("generate_until", TEXT[:60], {"max_gen_toks": 40})], disable_tqdm=True)
    assert found == [text[: text.index(text[20])]]


def test_chats_are_put_into_the_models_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a chat template that is not applied, or a first token that appears twice."""
    model = harness()
    turns = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="a/tiny has no chat template: leave --apply_chat_template out"):
        model.apply_chat_template(turns)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    assert model.chat_template(True) == TEMPLATE
    assert model.apply_chat_template(turns) == "<Hi>:"
    assert model.apply_chat_template(turns, add_generation_prompt=False) == "<Hi"
    assert model.tokenizer_name == "a__tiny"


# Wrong arguments.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"polcy": "sink-window"}, "model_args has the unknown key 'polcy': choose from target, draft, drafter"),
        ({"policy": "sink-window", "sink": 4}, "the cache policy sink-window has no setting 'sink'"),
        ({"policy": "sinks"}, "no cache policy is named 'sinks'"),
        ({"drafter": "heads"}, "no drafter is named 'heads': choose from none, lookup, head, model, universal"),
        ({"drafter": "model"}, "drafter=model needs a draft model"),
        ({"drafter": "none", "draft": "layers:0"}, "draft=layers:0 is of no use with drafter=none"),
        ({"draft": "layers:0", "head": "h.safetensors"}, "draft=layers:0 is of no use with drafter=lookup.head"),
        (
            {"drafter": "head"},
            "no head comes with a/tiny: name the folder of one with head=, or choose another drafter=",
        ),
        ({"head": "./nowhere.safetensors"}, "cannot read the draft head nowhere.safetensors"),
        ({"controller": "adaptive", "k": 3}, "k=3 is of no use with controller=adaptive"),
        ({"shape": "static"}, "shape=static is of no use with drafter=lookup"),
        ({"nodes": "many"}, "nodes is 'many': it must be a whole number"),
        ({"batch_size": "auto"}, "batch_size is auto"),
        ({"k": 0}, "K is 0"),
        ({"target": "shape:tiny"}, "shape:tiny has no tokenizer"),
        ({"backend": "fast"}, "no backend is named 'fast'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_key_that_cannot_be_is_told_in_one_sentence(arguments: dict[str, Any], said: str) -> None:
    """Guards against a misspelt key that is ignored, and a run with another configuration than requested."""
    given = {"target": target(), "backend": "eager"} | arguments
    with pytest.raises((ValueError, SpecDecodeError), match=said) as told:
        SpecDecodeLM(given.pop("target"), **given)
    assert "\n" not in str(told.value)


# Whole runs.


TASKS = {
    "continued": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ntarget_delimiter: ''\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "read": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{context}}'\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 12, do_sample: false}\n",
}
ROWS = [{"context": TEXT[: 100 + i], "continuation": TEXT[200 : 220 + i]} for i in range(3)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Create a folder of local tasks, with the tiny model beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    for name, text in TASKS.items():
        rows = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(rows)}\ntest_split: test\n"
            f"doc_to_target: '{{{{continuation}}}}'\n{text}"
        )
    tokenizer().save_pretrained(save(tmp_path / "model"))
    return tmp_path


def test_a_run_of_local_tasks(tasks: Path) -> None:
    """Guards against a model that the harness cannot run from its arguments to its results."""
    given = f"target={tasks / 'model'},policy=sink-window,cache=64,backend=eager,dtype=float64,drafter=lookup,k=3"
    manager = TaskManager(include_path=tasks / "tasks", include_defaults=False)
    evaluate = partial(simple_evaluate, model="specdecode", tasks=["continued", "written"], task_manager=manager)
    results = evaluate(model_args=given, bootstrap_iters=0)
    loaded = get_model("specdecode").create_from_arg_string(given)
    lm = loaded._path.lm
    window = named_policy("sink-window", 64)
    total = 0.0
    for row, sample in zip(ROWS, results["samples"]["continued"], strict=True):
        path = make_decode_path("it", {"policy": "sink-window", "cache": 64}, lm, 3, "eager")
        tokens = lm.encode(row["context"] + row["continuation"])
        expected = -negative_log_likelihoods(path, tokens)[-len(row["continuation"]) :].sum().item()
        assert sample["filtered_resps"][0][0] == pytest.approx(expected, abs=1e-6)
        total += expected
    found = results["results"]["continued"]
    assert found["perplexity,none"] == pytest.approx(math.exp(-total / len(ROWS)), rel=1e-4)
    for row, sample in zip(ROWS, results["samples"]["written"], strict=True):
        tokens = lm.encode(row["context"])
        text = lm.decode(generate(lm, tokens, controller=FixedK(3), policy=window, max_new_tokens=12).tokens)
        assert sample["filtered_resps"] == [text.partition("\n")[0]]


def test_the_command_runs_the_harness(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a command whose options do not reach the harness, and errors shown as tracebacks."""

    # Skip the harness's own 15,000 tasks, which it reads at every start.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    def call(given: str) -> int:
        arguments = ["lm-eval", "--model_args", given, "--tasks", "read", "--limit", "1"]
        arguments += ["--include_path", str(tasks / "tasks"), "--output_path", str(tasks / "out.json")]
        return exit_code(monkeypatch, *arguments)

    assert call(f"target={tasks / 'model'},backend=eager") == 0
    assert "byte_perplexity" in capsys.readouterr().out
    (file,) = tasks.glob("out_*.json")
    assert json.loads(file.read_text())["config"]["model"] == "specdecode"
    assert call("polcy=sink-window") == 2
    assert "specdecode: model_args has the unknown key 'polcy'" in capsys.readouterr().err
