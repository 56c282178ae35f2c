"""A request: one prompt and the arguments of its decoding, checked on construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from specdecode.backends.graph import CudaGraphs, clock
from specdecode.controllers.base import Controller, FixedK
from specdecode.core.sampling import Sampling
from specdecode.core.stopping import Stops
from specdecode.decoding.values import TokenIds, prompt_ids, shape_or_text, token_ids, whole
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.arguments import check_cache_fits
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class Start:
    """The moment from which a request is timed.

    Attributes:
        at: time by `clock`, in seconds.
        capture_s: seconds of all captures of CUDA graphs in this process before that moment.
    """

    at: float = field(default_factory=lambda: clock())
    capture_s: float = field(default_factory=lambda: CudaGraphs.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt and all arguments of its decoding. See `generate` for the other fields.

    Attributes:
        tokens: the prompt as a list.
        start: the moment when the request, or this copy of it, was created.

    Raises:
        ValueError: the prompt is empty, or a token is outside the vocabulary. `max_new_tokens` is below 1. The model's
            context cannot hold the prompt and the new tokens, or the cache of a policy.
        UnsupportedModelError: the policy evicts, but the model's keys cannot be re-rotated.
    """

    target: LM
    prompt: Sequence[int] | Int[Tensor, " n"]
    drafter: Drafter = field(default_factory=NoDraft)
    controller: Controller = field(default_factory=lambda: FixedK(5))
    policy: CachePolicy = field(default_factory=KeepAll)
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    stops: Stops = field(default_factory=lambda: Stops((), (), None))
    logprobs: bool = False
    on_step: Callable[[list[int]], None] | None = None
    start: Start = field(default_factory=Start, init=False)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", prompt_ids(self.prompt))
        object.__setattr__(self, "max_new_tokens", whole("max_new_tokens", self.max_new_tokens))
        if not self.tokens:
            raise ValueError("the prompt is empty: decoding starts from at least one token")
        check_tokens(self.target, self.tokens, "prompt")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: at least 1 must be asked for")
        check_cache_fits(self.policy, self.target)
        if not self.policy.interval:
            self._check_context()

    @property
    def length_limit(self) -> int:
        """Number of tokens of the prompt and the longest continuation together."""
        return len(self.tokens) + self.max_new_tokens

    def _check_context(self) -> None:
        target, length = self.target, len(self.tokens)
        if length >= target.context_length:
            raise ValueError(
                f"the prompt has {length} tokens, but the context of {target.name} holds {target.context_length}:"
                " shorten it"
            )
        if self.length_limit > target.context_length:
            raise ValueError(
                f"{length} prompt tokens and {self.max_new_tokens} new ones exceed the context of {target.name},"
                f" {target.context_length} tokens: ask for at most {target.context_length - length}"
            )


def stops_of(target: LM, tokens: TokenIds, strings: str | Sequence[str] | None) -> Stops:
    """Return the stops for tokens and strings.

    Args:
        target: the model whose tokenizer gives the bytes of each token.
        tokens: token ids that end the text: one, several in a list or a tensor, or None for none.
        strings: one string, or several, that end the text; None for none.

    Raises:
        ValueError: as `Stops`, or a string is something else.
    """
    spell = target.spelling if strings and target.tokenizer is not None else None
    ids = () if tokens is None else token_ids("stop_token_ids", tokens)
    texts = (strings,) if isinstance(strings, str) else tuple(strings or ())
    if other := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"stop has {shape_or_text(other[0])}: give strings, and tokens as stop_token_ids")
    return Stops(ids, texts, spell)


def check_tokens(target: LM, tokens: Sequence[int], what: str) -> None:
    """Raise ValueError if a token is outside the target's vocabulary.

    Args:
        target: the model.
        tokens: token ids to check.
        what: name of the tokens in the message.
    """
    outside = next((token for token in tokens if not 0 <= token < target.vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} of the {what} is outside the vocabulary (0 to {target.vocab_size - 1})")
