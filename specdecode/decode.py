"""generate(): the one decoding loop. Every method is a combination of its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.controller import MAX_DRAFT_NODES, Controller, FixedK, Limit
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.none import NoDraft
from specdecode.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.keep_all import KeepAll
from specdecode.result import Generation, Step
from specdecode.sampling import Sampling
from specdecode.slots import Slots
from specdecode.tree import DraftTree
from specdecode.verify import accept

# Slots taken at the start for tokens to come; more are taken by doubling.
_AHEAD = 2048


@torch.inference_mode()
def generate(
    target: LM,
    prompt: Sequence[int] | Int[Tensor, " n"],
    *,
    drafter: Drafter = NoDraft(),
    controller: Controller = FixedK(5),
    policy: CachePolicy = KeepAll(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
    stop_token_ids: Sequence[int] = (),
    on_step: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue a prompt, with the tokens (or, when sampling, the law of tokens) of plain decoding of the target.

    Args:
        target: decides.
        prompt: token ids, at least one.
        drafter: proposes; `NoDraft()` is autoregressive decoding.
        controller: how long to draft.
        policy: what stays in the target's cache.
        sampling: how tokens are chosen; greedy by default.
        max_new_tokens: the length limit.
        stop_token_ids: any of these ends the text, and is its last token.
        on_step: called after each step with the tokens that it committed, as soon as they are known.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, no tokens asked for, or more than the model's
            context holds.
    """
    with target.recording_attention() if policy.reads_attention else nullcontext():
        return _generate(target, prompt, drafter, controller, policy, sampling, max_new_tokens, stop_token_ids, on_step)


def _generate(
    target: LM,
    prompt: Sequence[int] | Int[Tensor, " n"],
    drafter: Drafter,
    controller: Controller,
    policy: CachePolicy,
    sampling: Sampling,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    on_step: Callable[[list[int]], None] | None,
) -> Generation:
    started = time.perf_counter()
    tokens = [int(token) for token in prompt]
    _check(target, tokens, max_new_tokens, policy, controller)

    rng = sampling.rng()
    stops = frozenset(stop_token_ids)
    end = len(tokens) + max_new_tokens
    most = policy.keeps + policy.interval if policy.interval else min(end, len(tokens) + _AHEAD)
    slots = target.new_slots(most + MAX_DRAFT_NODES)
    result = Generation(prompt_tokens=len(tokens))
    prefill_started = time.perf_counter()
    read = 0  # tokens that went through the target; the rest are pending, the root at least

    # The first step's forward carries what is left of the prompt, so that a short prompt costs no forward of its own.
    while (chunk := min(PREFILL_CHUNK, _boundary(policy, slots) - read)) < len(tokens) - read:
        target.forward(slots, torch.tensor(tokens[read : read + chunk]))
        read += chunk
        result.prefill_forwards += 1
        if policy.reads_attention:
            slots.attend(range(chunk))
        result.compressions += target.evict(slots, policy)

    result.prefill_forwards_s = time.perf_counter() - prefill_started

    finished = False
    while not finished:
        step_started = time.perf_counter()
        forwards_before = drafter.forwards
        limit = controller.limit()
        # The target adds a token of its own, so the last one asked for need not be drafted; and no step may pass the
        # place where the policy evicts, or the tokens would depend on how the drafts fell.
        depth = min(limit.depth, end - len(tokens) - 1, _boundary(policy, slots) - len(tokens))
        tree = DraftTree.empty()
        if depth > 0:
            context = Context(tokens, target.vocab_size, sampling, rng)
            tree = drafter.propose(context, Limit(depth, limit.nodes))
        if tree.depth > depth:
            tree = tree.clip(depth)
        proposed_at = time.perf_counter()

        rows = len(tokens) - read + len(tree)
        logits = target.forward_tree(slots, tokens[read:], tree)
        result.peak_cache_bytes = max(result.peak_cache_bytes, slots.bytes_held)
        root = slots.length - len(tree) - 1
        verdict = accept(tree, logits.argmax(-1) if sampling.greedy else sampling.probs(logits), rng)
        verified_at = time.perf_counter()

        if policy.reads_attention:
            slots.attend([*range(len(tokens) - read), *(len(tokens) - read - 1 + node for node in verdict.path)])
        slots.keep([root + node for node in verdict.path], after=root + 1)
        emitted = verdict.tokens
        stop = next((i for i, token in enumerate(emitted) if token in stops), None)
        if stop is not None:
            emitted = emitted[: stop + 1]
            result.finish_reason = "stop"
        tokens += emitted
        finished = stop is not None or len(tokens) == end
        read = len(tokens) - 1
        if not finished:
            result.compressions += target.evict(slots, policy)

        now = time.perf_counter()
        step = Step(
            drafted=len(tree),
            depth=tree.depth,
            rows=rows,
            accepted=min(len(verdict.path), len(emitted)),
            emitted=len(emitted),
            draft_forwards=drafter.forwards - forwards_before,
            draft_s=proposed_at - step_started,
            verify_s=verified_at - proposed_at,
            total_s=now - step_started,
        )
        result.steps.append(step)
        controller.observe(step)
        if len(result.steps) == 1:
            result.prefill_s = now - started
        if on_step is not None:
            on_step(emitted)

    result.tokens = tokens[result.prompt_tokens :]
    result.cache_bytes = slots.bytes_held
    result.decode_s = time.perf_counter() - started - result.prefill_s
    return result


def _boundary(policy: CachePolicy, slots: Slots) -> int:
    """The committed length, beyond the present one, at which the policy evicts next."""
    return boundary(policy, slots.committed + 1, slots.length + 1)


def _check(target: LM, prompt: Sequence[int], max_new_tokens: int, policy: CachePolicy, controller: Controller) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: decoding starts from at least one token")
    outside = next((token for token in prompt if not 0 <= token < target.vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} of the prompt is outside the vocabulary (0 to {target.vocab_size - 1})")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 must be asked for")
    if policy.interval:
        _check_policy(target, policy, controller)
        return
    if len(prompt) >= target.context_length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the context of {target.name} holds {target.context_length}:"
            " shorten it"
        )
    if len(prompt) + max_new_tokens > target.context_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the context of {target.name},"
            f" {target.context_length} tokens: ask for at most {target.context_length - len(prompt)}"
        )


def _check_policy(target: LM, policy: CachePolicy, controller: Controller) -> None:
    """A bounded cache has its own positions, so the model's context need only hold the cache."""
    most = policy.keeps + policy.interval
    if most > target.context_length:
        raise ValueError(
            f"the cache of {most} tokens exceeds the context of {target.name}, {target.context_length} tokens: take a"
            " smaller max_len"
        )
    depth = controller.limit().depth
    if most < policy.pinned + depth:
        raise ValueError(
            f"the cache of {most} tokens is too small for {policy.pinned} that always stay and a draft of {depth}: take"
            " a larger max_len or a smaller K"
        )
    _ = target.mover  # says so if this architecture's keys cannot be moved
