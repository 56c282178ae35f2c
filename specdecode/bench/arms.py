"""Arms: ways to decode, ours and the peers', under one interface and one counter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from specdecode.bench.runs.names import drafters
from specdecode.controllers.adaptive import AdaptiveK
from specdecode.controllers.base import Controller, FixedK
from specdecode.controllers.cost_aware import CostAware
from specdecode.core.result import Generation
from specdecode.decoding.generate import generate, generate_batch
from specdecode.decoding.measure_costs import measure_costs
from specdecode.drafters.base import Drafter
from specdecode.drafters.cascade import Cascade
from specdecode.drafters.head import HeadDrafter
from specdecode.drafters.lookup import PromptLookup
from specdecode.drafters.model import ModelDrafter
from specdecode.drafters.none import NoDraft
from specdecode.drafters.replay import ReplayDrafter
from specdecode.drafters.self_streaming import SelfStreamingDrafter
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, StaticTree, TreeShape
from specdecode.drafters.universal import UniversalDrafter
from specdecode.heads.bound import FittedHead, load_head, untrained
from specdecode.models.lm import LM, synchronise
from specdecode.models.loading import check_vocabulary
from specdecode.policies import policy as named_policy
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class Run:
    """One output, its times and its counts: plain values, so that it travels as JSON.

    Attributes:
        tokens: the new tokens.
        total_s: seconds of the whole call, the device synchronised. Of a batch, here and below, a prompt's share.
        ttft_s: seconds to the first committed tokens.
        counts: of "steps" (target forwards that committed tokens); for our own arms also "target_forwards",
            "draft_forwards", "drafted" and "accepted" tokens, "rejections" (steps that rejected a proposal),
            "cache_bytes" at the end, "peak_cache_bytes", "grown_bytes" (by how much that is more than after the first
            step), "attended_bytes" of KV over all steps, "compressions", and "later_tokens": those after the first
            step, which carries the prompt.
        seconds: of our own arms: "draft", "verify" and "overhead", which make up the total; and "later_draft" and
            "later_verify", after the first step.
        histograms: of our own arms: steps by "accepted" length and by "depth" of the tree.
        cuts: what the run was when it had got to the shorter lengths that were asked for, one by one.
    """

    tokens: list[int]
    total_s: float
    ttft_s: float
    counts: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    cuts: list[Run] = field(default_factory=list)

    def at(self, length: int) -> Run | None:
        """What it was when it had got to a length; None where it was not cut there."""
        return next((run for run in (self, *self.cuts) if len(run.tokens) == length), None)


def _run_of(results: Sequence[Generation], total_s: float, lengths: Sequence[int] = ()) -> Run:
    """Counts of the first prompt of a batch, and its share of the time: the same part for each prompt. A batch, whose
    prompts end at different times, is not cut."""
    result, share = results[0], 1 / len(results)

    def verify_s(start: int) -> float:
        # A forward is counted by each of its prompts; the one with the most steps was in all of them.
        return max(sum(step.verify_s for step in each.steps[start:]) for each in results)

    draft_s = share * sum(each.draft_s for each in results)
    verified_s = share * (verify_s(0) + sum(each.prefill_forwards_s for each in results))
    return Run(
        tokens=result.tokens,
        total_s=share * total_s,
        ttft_s=share * result.ttft_s,
        counts={
            "steps": len(result.steps),
            "target_forwards": result.target_forwards,
            "draft_forwards": result.draft_forwards,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "rejections": result.rejections,
            "cache_bytes": result.cache_bytes,
            "peak_cache_bytes": result.peak_cache_bytes,
            "grown_bytes": max(0, result.peak_cache_bytes - result.steps[0].cache_bytes),
            "attended_bytes": result.attended_bytes,
            "compressions": result.compressions,
            "later_tokens": len(result.tokens) - result.steps[0].emitted,
        },
        seconds={
            "draft": draft_s,
            "verify": verified_s,
            "overhead": share * total_s - draft_s - verified_s,
            "later_draft": share * sum(step.draft_s for each in results for step in each.steps[1:]),
            "later_verify": share * verify_s(1),
        },
        histograms={"accepted": result.accepted_lengths, "depth": result.depths},
        cuts=[
            _run_of([short], total_s - (result.total_s - short.total_s))
            for short in (result.until(length) for length in lengths if length < len(result.tokens))
            if len(results) == 1
        ],
    )


def _beginnings(prompt: Sequence[int], count: int) -> list[Sequence[int]]:
    """The prompt and ever shorter beginnings of it, which go on differently: a batch of one prompt's making."""
    return [prompt[: max(1, len(prompt) * (count - place) // count)] for place in range(count)]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode.

    Attributes:
        name: in tables, test ids and baselines.
        run: from a prompt, the number of new tokens and the output that is expected (for replayed drafts) to a run.
        target: the model that it decodes.
        synthetic: its acceptance is set and not found out.
        against: the peer's arm that does the same with the same settings.
        policy: what stays in the target's cache.
        quantize: how the target's weights are quantised, if they are. With that, or a policy that does not keep
            everything, the arm is lossy: its output is not the baseline's but that of plain decoding of the same
            weights with the same policy.
        timed: how long it drafts depends on the clock, and so do its counts.
        options: the preset's entry that it was made of.
        stop_token_ids: those that end an output early.
    """

    name: str
    run: Callable[[Sequence[int], int, Sequence[int]], Run]
    target: LM
    synthetic: bool = False
    against: str | None = None
    policy: CachePolicy = field(default_factory=KeepAll)
    quantize: str | None = None
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()

    @property
    def lossy(self) -> bool:
        return self.policy.interval > 0 or self.quantize is not None

    def expected(self, prompt: Sequence[int], tokens: Sequence[int], length: int) -> Sequence[int]:
        """What the arm must write if it is asked for so many tokens, where the baseline wrote these."""
        if not self.lossy:
            return tokens
        rules: dict[str, Any] = {"max_new_tokens": length, "stop_token_ids": self.stop_token_ids}
        return generate(self.target, prompt, policy=self.policy, **rules).tokens


def make(
    name: str,
    options: dict[str, Any],
    target: LM,
    draft: LM | None,
    backend: str = "auto",
    lengths: Sequence[int] = (),
    stop_token_ids: Sequence[int] = (),
) -> Arm:
    """An arm from a preset's entry.

    Keys: `drafter` ("none", "lookup", "head", "model", "universal" or "self-streaming"; with a plus between them, as in
    "lookup+head", a cascade), `controller` ("fixed" with `k`, "adaptive" or "cost-aware"), `nodes`, `ngram`,
    `min_ngram`, `branches`, `shape` ("chain", "static" or "best-first"), `branching`, `threshold`, `head` (a file, in
    place of the head that comes with the target), `draft_cache` (tokens that a streaming draft holds), `replay`
    (acceptance), `batch` (prompts decoded at once: the block's own and shorter beginnings of it), `policy`
    ("sink-window" and the others of `specdecode.policies`) with `cache` (tokens that it holds); or `peer` ("generate",
    "assisted" or "prompt-lookup") with `k`, `ngram` and `confidence` (below which transformers stops drafting). With
    `quantize` ("int8") it decodes the target with quantised weights, and drafts with `draft` as it is. A target of
    random weights gets a head of random weights. `backend` says how the forwards of both run. What a cost-aware arm
    goes by is measured here. `against` names the peer's arm that does the same.

    Args:
        name: of the arm.
        options: the entry.
        target: loaded with backend="eager": peers decode it as it is.
        draft: likewise.
        backend: of our own arms that name none.
        lengths: at which a run is cut, to tell what a shorter one would have been.
        stop_token_ids: those that end an output; none by default, so that every output has the asked length.

    Raises:
        ModelFileError: a head that is not there, or is damaged.
        UnsupportedModelError: the target's weights cannot be quantised, or the head is another target's.
        ValueError: a key or value that is not known, or a draft model or a package that is missing.
        TokenizerMismatchError: a draft model whose vocabulary does not serve this arm.
    """
    entry, options = options, dict(options)
    peer = options.pop("peer", None)
    asked = drafters(entry)
    shares_vocabulary = peer == "assisted" or "model" in asked
    if shares_vocabulary or "universal" in asked:
        if draft is None:
            raise ValueError(f"arm {name!r} needs a draft model: name one with --draft")
        if shares_vocabulary:
            check_vocabulary(target, draft)
    replay = options.pop("replay", None)
    against = options.pop("against", None)
    kind, cache = options.pop("policy", None), options.pop("cache", 256)
    policy = named_policy(kind, cache) if kind else KeepAll()
    if peer is not None and policy.interval:
        raise ValueError(f"arm {name!r} is transformers' own: it takes no policy")
    if "head" in asked:
        options.setdefault("head", target.name)
    quantize = options.pop("quantize", None)
    if quantize is not None:
        target = target.quantized(quantize)
    timed = options.get("controller") == "cost-aware"
    if peer is None:
        kind = options.pop("backend", backend)
        target, draft = target.with_backend(kind), draft and draft.with_backend(kind)
        run = _ours(options, target, draft, replay, policy, lengths, stop_token_ids)
    else:
        run = _peer(peer, options, target, draft, lengths, stop_token_ids)
    if options:
        raise ValueError(f"arm {name!r} has unknown options: {', '.join(options)}")
    synthetic = target.synthetic or replay is not None
    return Arm(name, run, target, synthetic, against, policy, quantize, timed, entry, stop_token_ids)


def _ours(
    options: dict[str, Any],
    target: LM,
    draft: LM | None,
    replay: float | None,
    policy: CachePolicy,
    lengths: Sequence[int],
    stop_token_ids: Sequence[int],
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    batch = options.pop("batch", 1)
    if batch < 1 or (batch > 1 and replay is not None):
        raise ValueError(f"batch is {batch}: it is 1 or more, and 1 for replayed drafts, which know one continuation")
    makers = [_drafter_maker(kind, options, target, draft) for kind in drafters(options)]
    options.pop("drafter", None)

    def make_drafter() -> Drafter:
        made = [make() for make in makers]
        return made[0] if len(made) == 1 else Cascade(*made)

    make_drafter()  # wrong values are told before anything is measured
    make_controller = _controller(options, target, make_drafter)

    def run(prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        def decode() -> list[Generation]:
            rules: dict[str, Any] = {
                "policy": policy,
                "max_new_tokens": max_new_tokens,
                "stop_token_ids": stop_token_ids,
            }
            if batch > 1:
                rules |= {"batch_size": batch, "drafter": make_drafter, "controller": make_controller}
                return generate_batch(target, _beginnings(prompt, batch), **rules)
            # All is fresh every time: a used drafter would still hold the prompt, and a controller know it.
            drafter = make_drafter()
            if replay is not None:
                drafter = ReplayDrafter(drafter, [*prompt, *expected], replay)
            return [generate(target, prompt, drafter=drafter, controller=make_controller(), **rules)]

        return _run_of(*_timed(target, decode), lengths)

    return run


def _drafter_maker(kind: str, options: dict[str, Any], target: LM, draft: LM | None) -> Callable[[], Drafter]:
    if kind == "none":
        return NoDraft
    if kind == "lookup":
        sizes = {"max_ngram": options.pop("ngram", 3), "min_ngram": options.pop("min_ngram", 1)}
        return partial(PromptLookup, **sizes, branches=options.pop("branches", 1))
    if kind == "model" and draft is not None:
        return partial(ModelDrafter, draft, _shape(options))
    if kind == "head":
        file = options.pop("head")
        head = FittedHead(untrained(target), target) if target.synthetic else load_head(file, target)
        return partial(HeadDrafter, head, _shape(options))
    if kind == "universal" and draft is not None:
        return partial(UniversalDrafter, target, draft)
    if kind == "self-streaming":
        return partial(SelfStreamingDrafter, target, options.pop("draft_cache", 256), shape=_shape(options))
    names = "none, lookup, head, model, universal, self-streaming"
    raise ValueError(f"no drafter is named {kind!r}: choose from {names}, or several with a plus between them")


def _controller(options: dict[str, Any], target: LM, make_drafter: Callable[[], Drafter]) -> Callable[[], Controller]:
    kind = options.pop("controller", "fixed")
    if kind == "fixed":
        fixed = FixedK(options.pop("k", 5))
        return lambda: fixed
    if "k" in options:
        raise ValueError(f"k is of no use with the controller {kind!r}, which finds it out: leave it out")
    if kind == "adaptive":
        return AdaptiveK
    if kind == "cost-aware":
        return partial(CostAware, measure_costs(target, make_drafter()))
    raise ValueError(f"no controller is named {kind!r}: choose from fixed, adaptive, cost-aware")


def _shape(options: dict[str, Any]) -> TreeShape:
    kind = options.pop("shape", "chain")
    if kind == "chain":
        return Chain()
    if kind == "static":
        return StaticTree(tuple(options.pop("branching", (2,) * 5)), options.pop("nodes", 32))
    if kind == "best-first":
        return BestFirstTree(options.pop("nodes", 32), options.pop("threshold", 0.1))
    raise ValueError(f"no tree shape is named {kind!r}: choose from chain, static, best-first")


def _peer(
    kind: str,
    options: dict[str, Any],
    target: LM,
    draft: LM | None,
    lengths: Sequence[int],
    stop_token_ids: Sequence[int],
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    """transformers' own decoding of the same modules, its settings those of the arm that it is compared with."""
    # Its advice on the settings below would break into the progress of the run.
    transformers.logging.set_verbosity_error()
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if kind == "assisted":
        assert draft is not None
        arguments["assistant_model"] = draft.model
        draft_settings = {
            "num_assistant_tokens": options.pop("k", 5),
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": options.pop("confidence", 0.0),
        }
    elif kind == "prompt-lookup":
        settings = {"prompt_lookup_num_tokens": options.pop("k", 5), "max_matching_ngram_size": options.pop("ngram", 2)}
        draft_settings = {}
    elif kind == "generate":
        draft_settings = {}
    else:
        raise ValueError(f"no peer is named {kind!r}: choose from generate, assisted, prompt-lookup")

    def run(prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        # What a configuration leaves open, transformers takes from the model: a bare one keeps stop tokens off.
        target.model.generation_config = GenerationConfig(pad_token_id=0)
        if draft is not None and draft_settings:
            draft.model.generation_config = GenerationConfig(pad_token_id=0, **draft_settings)
        configuration = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(stop_token_ids) or None,
            **settings,
        )
        ids = torch.tensor([list(prompt)], device=target.device)
        clock = _Clock()
        started = time.perf_counter()
        output, total = _timed(
            target,
            lambda: target.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=configuration,
                streamer=clock,
                **arguments,
            ),
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        ttft_s = clock.times[1] - started

        def cut(length: int) -> Run:
            steps = next(step for step, written in enumerate(clock.written) if written >= length)
            return Run(tokens[:length], clock.times[steps] - started, ttft_s, {"steps": steps})

        cuts = [cut(length) for length in lengths if length < len(tokens)]
        return Run(tokens, total, ttft_s, {"steps": len(clock.times) - 1}, cuts=cuts)

    return run


class _Clock(BaseStreamer):
    """Notes when tokens come, and how many have come by then; the first that it is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.written: list[int] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        self.written.append(self.written[-1] + value.numel() if self.written else 0)

    def end(self) -> None:
        pass


def _timed(target: LM, call: Callable[[], Any]) -> tuple[Any, float]:
    synchronise(target.device)
    started = time.perf_counter()
    result = call()
    synchronise(target.device)
    return result, time.perf_counter() - started
