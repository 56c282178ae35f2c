"""transformers' own decoding, as arms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.run import Run, timed_call
from specdecode.bench.runs.counts import Counts
from specdecode.models.lm import LM

# The default of transformers, which is not this package's.
_NGRAM_TOKENS = 2
# A static cache of another size is compiled for anew: sizes are multiples of this, in tokens.
_CACHE_TOKENS = 256
_WARM_UP_TOKENS = 3  # the first is the prompt's, which is not compiled


def peer_run(
    spec: ArmSpec, target: LM, draft: LM | None, lengths: Sequence[int], stop_token_ids: Sequence[int]
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    """Return a function that decodes a prompt by transformers, and times it. It uses the same modules, and the settings
    of the arm that it is compared with. The arguments are those of `make_arm`."""
    # Its advice on the settings below would break into the progress of the run.
    transformers.logging.set_verbosity_error()
    settings: dict[str, Any] = {}
    draft_settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if spec.peer == "assisted":
        assert draft is not None
        arguments["assistant_model"] = draft.model
        draft_settings = {
            "num_assistant_tokens": spec.fixed_k().k,
            "num_assistant_tokens_schedule": "constant",
            # Unless the arm says otherwise, it never stops drafting before.
            "assistant_confidence_threshold": spec.confidence or 0.0,
        }
    elif spec.peer == "prompt-lookup":
        settings = {
            "prompt_lookup_num_tokens": spec.fixed_k().k,
            "max_matching_ngram_size": _NGRAM_TOKENS if spec.ngram is None else spec.ngram,
        }

    compiled = _Compiled(target) if spec.peer == "generate-compiled" else None

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
        if compiled is not None:
            configuration.compile_config = compiled.config
            arguments["past_key_values"] = compiled.cache(ids, max_new_tokens)
        clock = _Clock()
        started = time.perf_counter()
        output, total = timed_call(
            target.device,
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
            return Run(tokens[:length], clock.times[steps] - started, ttft_s, Counts(steps=steps))

        cuts = [cut(length) for length in lengths if length < len(tokens)]
        return Run(tokens, total, ttft_s, Counts(steps=len(clock.times) - 1), cuts=cuts)

    return run


class _Compiled:
    """A static cache that grows between runs, never in them: the forward is compiled anew for each size.

    Args:
        target: whose forward transformers compiles; it leaves the prompt's forward as it is.
    """

    def __init__(self, target: LM) -> None:
        self._target = target
        self._cache: StaticCache | None = None
        self._tokens = 0
        self.config = CompileConfig()
        if target.device.type == "cpu":
            # It takes a GPU for granted, and CUDA graphs.
            self.config = CompileConfig(mode="default")
            self.config._compile_all_devices = True  # type: ignore[assignment]

    def cache(self, ids: Tensor, max_new_tokens: int) -> StaticCache:
        """Return an empty cache with room for a prompt [1, n] and its output, for which the forward is compiled."""
        needed = ids.shape[1] + max_new_tokens
        if self._cache is None or needed > self._tokens:
            self._tokens = -(-needed // _CACHE_TOKENS) * _CACHE_TOKENS
            self._cache = StaticCache(config=self._target.model.config, max_cache_len=self._tokens)
            configuration = GenerationConfig(
                max_new_tokens=_WARM_UP_TOKENS, do_sample=False, pad_token_id=0, compile_config=self.config
            )
            self._target.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=configuration,
                past_key_values=self._cache,
            )
        self._cache.reset()
        return self._cache


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
