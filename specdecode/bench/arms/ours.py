"""This package's decoding, as arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from specdecode.bench.arms.run import Run, run_of, timed_call
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
from specdecode.heads.bound import BoundHead, load_head, untrained
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy


def _beginnings(prompt: Sequence[int], count: int) -> list[Sequence[int]]:
    """The prompt and ever shorter beginnings of it, which go on differently: a batch of one prompt's making."""
    return [prompt[: max(1, len(prompt) * (count - place) // count)] for place in range(count)]


def our_run(
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

        return run_of(*timed_call(target, decode), lengths)

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
        head = BoundHead(untrained(target), target) if target.synthetic else load_head(file, target)
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
