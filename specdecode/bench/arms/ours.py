"""Arms that this package decodes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.parts import controller_maker, drafter_maker
from specdecode.bench.arms.run import Run, run_of
from specdecode.bench.arms.slices import end_step, timed_call
from specdecode.core.result import Generation
from specdecode.decoding.generate import generate, generate_batch
from specdecode.drafters.replay import ReplayDrafter
from specdecode.models.lm import LM


def our_run(
    spec: ArmSpec, target: LM, draft: LM | None, lengths: Sequence[int], stop_token_ids: Sequence[int]
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    """Return a function that decodes a prompt as the arm does, and times it. The arguments are those of `make_arm`."""
    policy = spec.cache_policy()
    make_drafter = drafter_maker(spec, target, draft)
    make_controller = controller_maker(spec, target, make_drafter)

    def run(prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        lost: int | None = None

        def decode() -> list[Generation]:
            nonlocal lost
            rules: dict[str, Any] = {
                "policy": policy,
                "max_new_tokens": max_new_tokens,
                "stop_token_ids": stop_token_ids,
            }
            if spec.batch > 1:
                rules |= {"batch_size": spec.batch, "drafter": make_drafter, "controller": make_controller}
                return generate_batch(target, _beginnings(prompt, spec.batch), **rules)
            # All parts are new in each run: a used drafter would still hold the prompt, and a controller would know it.
            drafter = make_drafter()
            if spec.replay is not None:
                # Each text has luck of its own, and the arms share it.
                seed = zlib.crc32(repr(list(prompt)).encode())
                drafter = ReplayDrafter(drafter, [*prompt, *expected], spec.replay, seed)
            result = generate(target, prompt, drafter=drafter, controller=make_controller(), on_step=end_step, **rules)
            if isinstance(drafter, ReplayDrafter):
                lost = drafter.lost
            return [result]

        results, total_s = timed_call(target.device, decode)
        return run_of(results, total_s, lengths, lost)

    return run


def _beginnings(prompt: Sequence[int], count: int) -> list[Sequence[int]]:
    """Return the prompt and ever shorter beginnings of it, which have other continuations: a batch from one prompt."""
    return [prompt[: max(1, len(prompt) * (count - place) // count)] for place in range(count)]
