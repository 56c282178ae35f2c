"""Speculative decoding where transformers' `model.generate(...)` is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK
from specdecode.core.result import Generation
from specdecode.core.sampling import Sampling
from specdecode.decoding.generate import generate_batch
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

# The fields of a GenerationConfig that are honoured, and what transformers takes where they are not set.
_HONOURED: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "eos_token_id": None,
    "pad_token_id": None,
    "stop_strings": None,
    "num_return_sequences": 1,
}
_DEFAULT_NEW_TOKENS = 20

# Fields that say nothing about the tokens here: they set beam search, encoders, transformers' own assistants, or how
# its forwards run.
_WITHOUT_EFFECT = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "bos_token_id",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prefill_chunk_size",
    "target_lookbehind",
    "tokenizer",
    "transformers_version",
}
# Off, for the others, is zero or False; for these it is another value.
_OFF: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "use_cache": True,
}


class SpecDecoder:
    """A target with a way to speculate, to be called as a transformers model is: `generate(input_ids, ...)`.

    Args:
        target: decides.
        drafter: makes the drafter of one prompt, as `lambda: ModelDrafter(draft)` does.
        controller: makes the controller of one prompt.
        policy: what stays in the target's cache.

    Attributes:
        results: what the last call did, for each sequence that it returned.

    Raises:
        ValueError: a drafter in the place of what makes one: each prompt of a batch needs its own.
    """

    def __init__(
        self,
        target: LM,
        drafter: Callable[[], Drafter] = NoDraft,
        *,
        controller: Callable[[], Controller] = partial(FixedK, 5),
        policy: CachePolicy = KeepAll(),
    ) -> None:
        for name, make in (("drafter", drafter), ("controller", controller)):
            if not callable(make):
                kind = type(make).__name__
                raise ValueError(f"{name} must make one for each prompt: give `lambda: {kind}(...)`, not a {kind}")
        self.target = target
        self.drafter = drafter
        self.controller = controller
        self.policy = policy
        self.results: list[Generation] = []

    def generate(
        self,
        input_ids: Int[Tensor, "rows n"],
        generation_config: Any = None,
        *,
        attention_mask: Int[Tensor, "rows n"] | None = None,
        streamer: Any = None,
        **settings: Any,
    ) -> Int[Tensor, "sequences length"]:
        """Continue prompts as `model.generate` of transformers does: the same arguments and, in greedy decoding, the
        same tokens.

        Settings are taken from the call, else from `generation_config`, else from the model's own, else they are
        transformers' defaults. Honoured are `max_new_tokens`, `max_length`, `do_sample`, `temperature`, `top_k`,
        `top_p`, `eos_token_id`, `pad_token_id`, `stop_strings` and `num_return_sequences`. Sampling draws on torch's
        global generator, so `torch.manual_seed` repeats it.

        Args:
            input_ids: prompts, padded on the left if they differ in length.
            generation_config: a transformers GenerationConfig.
            attention_mask: 0 marks padding; without it, the prompts are taken as they are.
            streamer: given the prompt, then the tokens of each step, of a single sequence.
            settings: fields of a GenerationConfig.

        Returns:
            Prompts and continuations, padded on the right by `pad_token_id` (or the first `eos_token_id`).

        Raises:
            ValueError: a setting that is not honoured and would change the tokens, by its name; padding that is not on
                the left; or what `specdecode.generate` refuses.
        """
        given = self._settings(generation_config, settings)
        rows, width = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape or (attention_mask.diff(dim=1) < 0).any():
            raise ValueError("attention_mask must be of the shape of input_ids, and padding must be on the left")
        copies = given["num_return_sequences"]
        if copies > 1 and not given["do_sample"]:
            raise ValueError(f"num_return_sequences is {copies}: greedy decoding has one continuation (set do_sample)")
        if streamer is not None and rows * copies > 1:
            raise ValueError(f"a streamer writes one sequence, and {rows * copies} are asked for")

        input_ids = input_ids.repeat_interleave(copies, 0)
        masks = attention_mask.bool().repeat_interleave(copies, 0)
        prompts = [row[mask].tolist() for row, mask in zip(input_ids, masks, strict=True)]
        stops = given["eos_token_id"]
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        self.results = generate_batch(
            self.target,
            prompts,
            batch_size=len(prompts),
            drafter=self.drafter,
            controller=self.controller,
            policy=self.policy,
            sampling=_sampling(given),
            max_new_tokens=_new_tokens(given, width),
            stop_token_ids=stops,
            stop=given["stop_strings"] or (),
            on_step=None if streamer is None else lambda _, tokens: streamer.put(torch.tensor(tokens)),
        )
        if streamer is not None:
            streamer.end()
        padding = given["pad_token_id"]
        filler = padding if padding is not None else stops[0] if stops else 0
        longest = max(len(result.tokens) for result in self.results)
        new = [result.tokens + [filler] * (longest - len(result.tokens)) for result in self.results]
        return torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], 1)

    def _settings(self, generation_config: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """The honoured settings, from the most specific place that sets them."""
        given: dict[str, Any] = {}
        for place in (self.target.model.generation_config.to_dict(), generation_config, settings):
            values = place if isinstance(place, dict) else {} if place is None else place.to_dict()
            given |= {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            neutral = value == _OFF[name] if name in _OFF else not value
            if name not in _HONOURED and name not in _WITHOUT_EFFECT and not neutral:
                raise ValueError(
                    f"{name} is {value!r}, which is not honoured here and would change the output: unset it"
                )
        return {name: given.get(name, default) for name, default in _HONOURED.items()}


def _sampling(given: dict[str, Any]) -> Sampling:
    if not given["do_sample"]:
        return Sampling()
    # The global generator is where users of transformers set the seed.
    seed = int(torch.randint(2**62, ()))
    return Sampling(given["temperature"], given["top_k"], given["top_p"], seed)


def _new_tokens(given: dict[str, Any], width: int) -> int:
    if given["max_new_tokens"] is not None:
        return int(given["max_new_tokens"])
    if given["max_length"] is None:
        return _DEFAULT_NEW_TOKENS
    if given["max_length"] <= width:
        raise ValueError(f"max_length is {given['max_length']}, and the prompts have {width} tokens: raise it")
    return int(given["max_length"]) - width
