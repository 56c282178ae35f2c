"""The settings of transformers' `generate`: resolved by the same rules, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch

from specdecode.core.sampling import Sampling
from specdecode.decoding.values import shape_or_text, token_ids, whole

# The honoured settings. For each, the value that transformers uses if it is not set, and if the call sets it to None.
_HONOURED: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (None, None),
    "max_length": (None, None),
    "do_sample": (False, False),
    "temperature": (1.0, 1.0),
    "top_k": (50, 0),
    "top_p": (1.0, 1.0),
    "eos_token_id": (None, None),
    "pad_token_id": (None, None),
    "stop_strings": (None, None),
    "num_return_sequences": (1, 1),
}
_DEFAULT_NEW_TOKENS = 20

# Settings that do not change the tokens here, whatever their value: they tune beam search, encoders, transformers' own
# assistants, or the execution of its forwards.
_WITHOUT_EFFECT = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prefill_chunk_size",
    "target_lookbehind",
    "transformers_version",
}
# Values of other settings that do not change the tokens. A setting that is not listed must be None.
_OFF: dict[str, Any] = {
    "begin_suppress_tokens": [],
    "cache_implementation": "hybrid",  # the usual cache to transformers, as files of Gemma 2 and 3 say
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "is_assistant": False,
    "logits_processor": [],
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "stopping_criteria": [],
    "suppress_tokens": [],
    "synced_gpus": False,
    "token_healing": False,
    "trust_remote_code": False,
    "typical_p": 1.0,
    "use_cache": True,
    "use_mtp": False,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved settings of a call.

    Attributes:
        max_new_tokens: largest number of new tokens; None if it is not set, so that `max_length` or a default counts.
        max_length: largest number of tokens of prompt and output together; None if it is not set.
        do_sample: whether tokens are sampled.
        temperature: as in `Sampling`.
        top_k: as in `Sampling`.
        top_p: as in `Sampling`.
        stop_token_ids: tokens that end a text; None if they are not set.
        padding: token that fills up texts that are shorter than others; None if it is not set.
        stop_strings: strings that end a text.
        copies: number of texts for each prompt.
    """

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    stop_token_ids: tuple[int, ...] | None
    padding: int | None
    stop_strings: tuple[str, ...]
    copies: int

    @classmethod
    def resolve(cls, model_config: Any, configuration: Any, call: Mapping[str, Any]) -> Settings:
        """Resolve each setting: the call counts first, then its configuration, then the model's configuration.

        A None in the call unsets a setting. A None in a configuration is ignored.

        Args:
            model_config: the model's GenerationConfig.
            configuration: the call's GenerationConfig, or None.
            call: settings of the call by name.

        Raises:
            ValueError: a setting would change the tokens and is not honoured, or its value is of the wrong type or
                impossible. The message names the setting.
        """
        merged: dict[str, Any] = {}
        # transformers keeps unknown keys of a checkpoint's file, and ignores them.
        fields = type(model_config)().to_dict()
        for place in (model_config, configuration):
            try:
                values = {} if place is None else place.to_dict()
            except AttributeError:
                raise ValueError(
                    f"generation_config is a {type(place).__name__}: give a GenerationConfig, or the settings by name"
                ) from None
            merged |= {name: value for name, value in values.items() if value is not None and name in fields}
        merged |= call
        for name, value in merged.items():
            if name not in _HONOURED and name not in _WITHOUT_EFFECT and not _is_off(name, value):
                raise ValueError(
                    f"{name} is {shape_or_text(value)}, which is not honoured here and would change the output:"
                    " unset it"
                )
        resolved = {
            name: usual if name not in merged else unset if merged[name] is None else merged[name]
            for name, (usual, unset) in _HONOURED.items()
        }
        stops, strings = resolved["eos_token_id"], resolved["stop_strings"]
        settings = cls(
            max_new_tokens=_whole_or_none("max_new_tokens", resolved["max_new_tokens"]),
            max_length=_whole_or_none("max_length", resolved["max_length"]),
            do_sample=_truth("do_sample", resolved["do_sample"]),
            temperature=_number("temperature", resolved["temperature"]),
            top_k=whole("top_k", resolved["top_k"]),
            top_p=_number("top_p", resolved["top_p"]),
            stop_token_ids=None if stops is None else token_ids("eos_token_id", stops),
            padding=_whole_or_none("pad_token_id", resolved["pad_token_id"]),
            stop_strings=() if strings is None else _strings("stop_strings", strings),
            copies=whole("num_return_sequences", resolved["num_return_sequences"]),
        )
        settings._check()
        return settings

    def _check(self) -> None:
        if self.copies < 1:
            raise ValueError(f"num_return_sequences is {self.copies}: at least 1 must be asked for")
        if self.copies > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences is {self.copies}: greedy decoding has one continuation (set do_sample)"
            )
        if self.do_sample and self.temperature == 0.0:
            raise ValueError("temperature is 0.0 and do_sample is set: for greedy decoding set do_sample=False")

    def sampling(self) -> Sampling:
        """Return the rule that chooses tokens.

        The seed is drawn from torch's global generator, because users of transformers seed that one.

        Raises:
            ValueError: a value is outside its range.
        """
        if not self.do_sample:
            return Sampling()
        return Sampling(self.temperature, self.top_k, self.top_p, int(torch.randint(2**62, ())))

    def new_tokens(self, width: int, context_length: int) -> int:
        """Return the largest number of new tokens.

        Args:
            width: number of tokens of the prompts, padding included.
            context_length: largest number of tokens of prompt and output together that the model allows.

        Raises:
            ValueError: the prompts have `max_length` tokens or more.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            left = context_length - width
            return min(_DEFAULT_NEW_TOKENS, left) if left > 0 else _DEFAULT_NEW_TOKENS
        if self.max_length <= width:
            raise ValueError(f"max_length is {self.max_length}, and the prompts have {width} tokens: raise it")
        return self.max_length - width

    @property
    def filler(self) -> int:
        """The token that fills up shorter texts: the padding token, else the first stop token, else 0."""
        return next((token for token in (self.padding, *(self.stop_token_ids or ())) if token is not None), 0)


def _is_off(name: str, value: Any) -> bool:
    # Comparing tensors or arrays gives no single truth value. A setting with such a value counts as set.
    return value is None or (name in _OFF and isinstance(value, Number | str | list) and value == _OFF[name])


def _whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value)


def _number(name: str, value: Any) -> float:
    try:
        return float("not text" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be a number") from None


def _truth(name: str, value: Any) -> bool:
    try:
        return bool(value)
    except (ValueError, RuntimeError):
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be True or False") from None


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be a string, or a list of them")
    if not strings or not all(strings):
        raise ValueError(f"{name} is {shape_or_text(value)}: each must be some text; for none at all, leave {name} out")
    return tuple(strings)
