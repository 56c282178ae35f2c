"""Speculative decoding where transformers' `model.generate(...)` is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK
from specdecode.core.result import Generation
from specdecode.decoding.generate import generate_batch
from specdecode.decoding.settings import Settings
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


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
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Int[Tensor, "sequences length"]:
        """Continue prompts as `model.generate` of transformers does: the same arguments and, in greedy decoding, the
        same tokens.

        Settings come from the call, else from `generation_config`, else from the model's own, else from transformers'
        defaults. A None in the call unsets. Supported are `max_new_tokens`, `max_length`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`, `stop_strings` and `num_return_sequences`.
        Sampling draws on torch's global generator, so `torch.manual_seed` repeats it.

        Args:
            inputs: [rows, n] prompts, padded on the left if they differ in length.
            generation_config: a transformers GenerationConfig.
            input_ids: the same as `inputs`, by the name that tokenizers give it.
            attention_mask: [rows, n]; 0 marks padding. Without it, tokens that are `pad_token_id` are padding, unless
                that also ends a text.
            streamer: given the prompt, then the tokens of each step, of a single sequence. It is told the end whatever
                happens, as somebody may wait for it.
            tokenizer: needed by transformers for `stop_strings`; here they are read with the target's own.
            settings: fields of a GenerationConfig.

        Returns:
            Prompts and continuations, padded on the right by `pad_token_id` (or the first `eos_token_id`).

        Raises:
            ValueError: a setting that is impossible, or that would change the tokens and is not supported; it is named.
                Padding that is not on the left. All that `specdecode.generate` refuses.
        """
        try:
            asked = Settings.resolve(self.target.model.generation_config, generation_config, settings)
            ids = _prompts(inputs, input_ids)
            mask = _mask(ids, attention_mask, asked)
            rows = len(ids) * asked.copies
            if streamer is not None and rows > 1:
                raise ValueError(f"a streamer writes one sequence, and {rows} are asked for")
            if asked.stop_strings and rows > 1 and asked.stop_token_ids is None:
                raise ValueError(
                    "stop_strings of several sequences need an eos_token_id, as transformers writes on behind a stop"
                    " string without one: give an eos_token_id, or decode the prompts one by one"
                )
            if asked.stop_strings:
                self._check_tokenizer(tokenizer)
            new_tokens = asked.new_tokens(ids.shape[1], self.target.context_length)
            return self._continue(ids, mask, asked, new_tokens, streamer)
        finally:
            if streamer is not None:
                streamer.end()

    def _check_tokenizer(self, tokenizer: Any) -> None:
        ours = self.target.tokenizer
        if ours is None or tokenizer is None or tokenizer is ours or tokenizer.get_vocab() == ours.get_vocab():
            return
        raise ValueError(
            f"tokenizer is not that of {self.target.name}, by which stop_strings are read here: leave it out"
        )

    def _continue(
        self, ids: Int[Tensor, "rows n"], mask: Bool[Tensor, "rows n"], asked: Settings, new_tokens: int, streamer: Any
    ) -> Int[Tensor, "sequences length"]:
        ids, mask = ids.repeat_interleave(asked.copies, 0), mask.repeat_interleave(asked.copies, 0)
        prompts = [row[is_text].tolist() for row, is_text in zip(ids, mask, strict=True)]
        sampling = asked.sampling()
        begun = False

        def stream(_: int, tokens: list[int]) -> None:
            nonlocal begun
            if not begun:
                # Not before the first step: a call that is refused writes nothing.
                streamer.put(ids.cpu())
                begun = True
            streamer.put(torch.tensor(tokens))

        self.results = generate_batch(
            self.target,
            prompts,
            batch_size=len(prompts),
            drafter=self.drafter,
            controller=self.controller,
            policy=self.policy,
            sampling=sampling,
            max_new_tokens=new_tokens,
            stop_token_ids=asked.stop_token_ids or (),
            stop=asked.stop_strings,
            on_step=None if streamer is None else stream,
        )
        longest = max(len(result.tokens) for result in self.results)
        new = [result.tokens + [asked.filler] * (longest - len(result.tokens)) for result in self.results]
        return torch.cat([ids, torch.tensor(new, device=ids.device)], 1)


def _prompts(inputs: Any, input_ids: Any) -> Int[Tensor, "rows n"]:
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are both given, and are the same argument: leave one of them out")
    ids = inputs if input_ids is None else input_ids
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"input_ids is {'missing' if ids is None else f'a {type(ids).__name__}'}: give a tensor of ids"
        )
    if ids.ndim != 2 or not len(ids) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}: give whole numbers, a row for each prompt"
        )
    return ids


def _mask(ids: Int[Tensor, "rows n"], attention_mask: Any, asked: Settings) -> Bool[Tensor, "rows n"]:
    """Return which tokens are no padding; as transformers infers it, where the call does not say.

    Raises:
        ValueError: padding that is not on the left, or a mask of other values or of another shape.
    """
    if attention_mask is None:
        padding = asked.padding
        if padding is None or padding in (asked.stop_token_ids or ()):
            return torch.ones_like(ids, dtype=torch.bool)
        mask = ids.ne(padding)
        if (mask.long().diff(dim=1) < 0).any():
            raise ValueError(
                f"input_ids has pad_token_id {padding} behind other tokens, and padding must be on the left: give an"
                " attention_mask if it is no padding"
            )
        return mask
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        shape = (
            f"of shape {tuple(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else f"a {type(attention_mask).__name__}"
        )
        raise ValueError(
            f"attention_mask is {shape}: it must be a tensor of the shape of input_ids, {tuple(ids.shape)}"
        )
    mask = attention_mask.bool()
    if (mask.to(attention_mask.dtype) != attention_mask).any() or (mask.long().diff(dim=1) < 0).any():
        raise ValueError("attention_mask must be 0 for padding and 1 elsewhere, and padding must be on the left")
    return mask
