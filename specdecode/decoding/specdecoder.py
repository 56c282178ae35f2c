"""Speculative decoding with the interface of transformers' `model.generate(...)`."""

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
from specdecode.decoding.values import check_makers, check_parts
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.arguments import check_lm
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


class SpecDecoder:
    """A target with a way to speculate, with the method of a transformers model: `generate(input_ids, ...)`.

    Args:
        target: the model that decides.
        drafter: returns a new drafter for one prompt, for example `lambda: ModelDrafter(draft)`.
        controller: returns a new controller for one prompt.
        policy: chooses the tokens that stay in the target's cache.

    Attributes:
        results: the tokens, counters and times of the last call, for each sequence that it returned.

    Raises:
        ValueError: the target is no `LM`. Or a drafter or controller was given, in place of a callable that returns one
            for each prompt.
    """

    def __init__(
        self,
        target: LM,
        drafter: Callable[[], Drafter] = NoDraft,
        *,
        controller: Callable[[], Controller] = partial(FixedK, 5),
        policy: CachePolicy = KeepAll(),
    ) -> None:
        check_lm("target", target)
        check_makers(drafter, controller)
        check_parts(policy=policy)
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
        """Continue prompts like `model.generate` of transformers: with the same arguments and, in greedy decoding, the
        same tokens.

        A setting of the call counts first, then `generation_config`, then the model's configuration, then the default
        of transformers. A None in the call unsets a setting. Supported are `max_new_tokens`, `max_length`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`, `stop_strings` and `num_return_sequences`.
        Sampling takes its seed from torch's global generator, so `torch.manual_seed` makes it repeatable.

        Args:
            inputs: [rows, n] prompts, padded on the left if they differ in length.
            generation_config: a transformers GenerationConfig.
            input_ids: another name of `inputs`, which tokenizers use. Give one of the two.
            attention_mask: [rows, n] 1 for tokens and 0 for padding. Without it, tokens equal to `pad_token_id` are
                padding, unless that token also ends a text.
            streamer: receives the prompt and then the tokens of each step, for a single sequence. Its `end` is called
                even after an error, as another thread may wait for it.
            tokenizer: transformers needs it for `stop_strings`. Here the target's tokenizer is used, and this one must
                have the same vocabulary.
            settings: fields of a GenerationConfig.

        Returns:
            [rows * num_return_sequences, length] prompts and continuations, padded on the right by `pad_token_id` (or
                the first `eos_token_id`).

        Raises:
            ValueError: a setting is impossible, or would change the tokens and is not supported; the message names it.
                The prompts are missing, or no matrix of ids. Padding is not on the left. Or `specdecode.generate` would
                refuse a prompt or an argument.
            UnsupportedModelError: as `specdecode.generate`.
            SpecDecodeError: as `specdecode.generate`.
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
                    "stop_strings of several sequences need an eos_token_id, as transformers continues after a stop"
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
            f"tokenizer is not that of {self.target.name}, which is used for stop_strings here: leave it out"
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
                # Only now, after the first step, so that a refused call writes nothing.
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
    """Return the mask of the tokens that are no padding. Without `attention_mask`, infer it as transformers does.

    Raises:
        ValueError: padding is not on the left, or `attention_mask` has other values or another shape.
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
