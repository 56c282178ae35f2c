"""Arms that transformers decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from specdecode.backends.layers import decoder_layers
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.run import Run
from specdecode.bench.arms.slices import end_step, own_s, timed_call
from specdecode.bench.runs.counts import Counts
from specdecode.models.lm import LM

# The default of transformers. This package has another.
_NGRAM_TOKENS = 2
# Sizes of static caches are multiples of this, in tokens, because each new size compiles the forward again.
_CACHE_TOKENS = 256
_WARM_UP_TOKENS = 3  # the first comes from the prompt's forward, which is not compiled


def peer_run(
    spec: ArmSpec, target: LM, draft: LM | None, lengths: Sequence[int], stop_token_ids: Sequence[int]
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    """Return a function that decodes a prompt with transformers, and times it. It uses the modules and the settings of
    the arm that the peer is compared with. The arguments are those of `make_arm`."""
    # Its warnings about the settings below would interrupt the progress of the run.
    transformers.logging.set_verbosity_error()
    settings: dict[str, Any] = {}
    draft_settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    drafting = target if spec.peer == "early-exit" else draft
    if spec.peer == "early-exit":
        _check_early_exit(spec, target)
        settings = {"assistant_early_exit": spec.early_exit}
    elif spec.peer in ("assisted", "universal"):
        assert draft is not None
        arguments["assistant_model"] = draft.model
        if spec.peer == "universal":
            arguments |= _tokenizers(spec, target, draft)
    if spec.peer in ("assisted", "universal", "early-exit"):
        draft_settings = {
            "num_assistant_tokens": spec.fixed_k().k,
            "num_assistant_tokens_schedule": "constant",
            # Without the key `confidence`, the draft never stops early.
            "assistant_confidence_threshold": spec.confidence or 0.0,
        }
    elif spec.peer == "prompt-lookup":
        settings = {
            "prompt_lookup_num_tokens": spec.fixed_k().k,
            "max_matching_ngram_size": _NGRAM_TOKENS if spec.ngram is None else spec.ngram,
        }

    compiled = _Compiled(target) if spec.peer == "generate-compiled" else None

    def run(prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        # transformers takes missing settings from the model's configuration. A new one has no stop tokens.
        target.model.generation_config = GenerationConfig(pad_token_id=0)
        if drafting is not None and draft_settings:
            drafting.model.generation_config = GenerationConfig(pad_token_id=0, **draft_settings)
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
            try:
                arguments["past_key_values"] = compiled.cache(ids, max_new_tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # as without a compiler: the other arms go on
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ArmError(f"arm {spec.name!r}: transformers cannot compile its forward here: {reason}") from error
        clock = _Clock()
        started = own_s()
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


def _check_early_exit(spec: ArmSpec, target: LM) -> None:
    assert spec.early_exit is not None
    layers = target.config.num_hidden_layers
    if not 0 < spec.early_exit < layers:
        raise spec.notation.error(f"early_exit is {spec.early_exit}: the target has {layers} layers, and fewer draft")
    if not _exits_early(target, spec.early_exit):
        raise spec.notation.error(
            f"transformers cannot draft with the first layers of a {type(target.model).__name__}, which always runs all"
        )


@torch.inference_mode()
def _exits_early(target: LM, count: int) -> bool:
    """Return whether a forward runs only `count` layers if its configuration names so many. Transformers relies on it,
    and after an error it would leave the target with that configuration."""
    layers = decoder_layers(target.model)
    base = getattr(target.model, target.model.base_model_prefix)
    if layers is None:
        return False
    reached: list[bool] = []
    hook = layers[-1].register_forward_pre_hook(lambda *_: reached.append(True))
    before = base.config.num_hidden_layers
    base.config.num_hidden_layers = count
    try:
        base(torch.tensor([[0]], device=target.device), use_cache=False)
    finally:
        base.config.num_hidden_layers = before
        hook.remove()
    return not reached


def _tokenizers(spec: ArmSpec, target: LM, draft: LM) -> dict[str, Any]:
    """Return the arguments with which transformers spells a draft's tokens in the target's (universal assisted
    generation)."""
    if target.tokenizer is None or draft.tokenizer is None:
        raise spec.notation.error("the peer universal needs the tokenizers of target and draft")
    if target.vocab_size == draft.vocab_size:
        raise spec.notation.error("the peer universal needs a draft of another vocabulary size: take the peer assisted")
    return {"tokenizer": target.tokenizer, "assistant_tokenizer": draft.tokenizer}


class _Compiled:
    """A static cache that grows only between runs, because the forward is compiled again for each size.

    Args:
        target: the model whose forward transformers compiles. The prompt's forward is not compiled.
    """

    def __init__(self, target: LM) -> None:
        self._target = target
        self._cache: StaticCache | None = None
        self._tokens = 0
        self.config = CompileConfig()
        if target.device.type == "cpu":
            # Its defaults require a GPU and CUDA graphs.
            self.config = CompileConfig(mode="default")
            self.config._compile_all_devices = True  # type: ignore[assignment]

    def cache(self, ids: Tensor, max_new_tokens: int) -> StaticCache:
        """Return an empty cache with room for a prompt [1, n] and its output. The forward is compiled for it."""
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
    """A record of the times at which tokens come, by `own_s`, and of their number so far. The first tokens are the
    prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.written: list[int] = []

    def put(self, value: Any) -> None:
        self.times.append(own_s())
        self.written.append(self.written[-1] + value.numel() if self.written else 0)
        if len(self.times) > 1:
            end_step(value.flatten())

    def end(self) -> None:
        pass
