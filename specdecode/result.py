"""What a generation did: counters and times step by step, and the measures made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """One proposal and one target forward over it.

    Attributes:
        drafted: proposed tokens.
        depth: the longest path among them.
        rows: tokens that the target read: the root, the proposals and, in the first step, the end of the prompt.
        accepted: proposals that were committed.
        emitted: committed tokens: the accepted ones and the target's own, cut at a stop token or the length limit.
        draft_forwards: forwards of the draft model.
        draft_s: seconds spent proposing (host clock: on a GPU, queued work is waited for in `verify_s`).
        verify_s: seconds of the target's forward and the acceptance.
        total_s: seconds of the whole step.
    """

    drafted: int
    depth: int
    rows: int
    accepted: int
    emitted: int
    draft_forwards: int
    draft_s: float
    verify_s: float
    total_s: float


@dataclass(slots=True)
class Generation:
    """The new tokens of one prompt, and how they came about.

    Attributes:
        tokens: the new token ids; a stop token that ended the generation is the last of them.
        finish_reason: "length" or "stop".
        steps: the steps, in order. The first one's target forward also carries the rest of the prompt.
        prompt_tokens: length of the prompt.
        prefill_forwards: target forwards over parts of a long prompt, before the first step.
        prefill_forwards_s: seconds of those.
        prefill_s: seconds from the call to the first committed tokens.
        decode_s: seconds from there to the end.
        compressions: evictions carried out by the cache policy.
        capture_s: seconds that capturing CUDA graphs took meanwhile, which are in none of the other times.
        cache_bytes: bytes of KV that the target held at the end, computed from its slots.
        peak_cache_bytes: the most that it held in any step, the proposals included.
        attended_bytes: bytes of KV that the target's steps attended to, summed over the steps.
        logprobs: natural logarithm of the probability of each new token under the target's own law, before temperature,
            top-k and top-p; None if not asked for.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["length", "stop"] = "length"
    steps: list[Step] = field(default_factory=list)
    prompt_tokens: int = 0
    prefill_forwards: int = 0
    prefill_forwards_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    capture_s: float = 0.0
    compressions: int = 0
    cache_bytes: int = 0
    peak_cache_bytes: int = 0
    attended_bytes: int = 0
    logprobs: list[float] | None = None

    @property
    def target_forwards(self) -> int:
        return self.prefill_forwards + len(self.steps)

    @property
    def draft_forwards(self) -> int:
        return sum(step.draft_forwards for step in self.steps)

    @property
    def drafted(self) -> int:
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)

    @property
    def draft_s(self) -> float:
        """Seconds spent proposing."""
        return sum(step.draft_s for step in self.steps)

    @property
    def verify_s(self) -> float:
        """Seconds of the target's forwards, those over the prompt included, and of the acceptance."""
        return self.prefill_forwards_s + sum(step.verify_s for step in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, 0 to 1; nan if nothing was drafted."""
        return _ratio(self.accepted, self.drafted)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens committed in a step (the literature's tau), at most depth + 1; nan without steps."""
        return _ratio(len(self.tokens), len(self.steps))

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each depth from 1: the share of the trees that reach it of which a node there was committed."""
        deepest = max((step.depth for step in self.steps), default=0)
        return [
            _ratio(sum(s.accepted >= d for s in self.steps), sum(s.depth >= d for s in self.steps))
            for d in range(1, deepest + 1)
        ]

    @property
    def accepted_lengths(self) -> list[int]:
        """Histogram: entry i counts the steps of which i proposals were committed."""
        return _histogram([step.accepted for step in self.steps])

    @property
    def depths(self) -> list[int]:
        """Histogram: entry i counts the steps whose tree was i deep."""
        return _histogram([step.depth for step in self.steps])

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token, in seconds: from the call to the first committed tokens."""
        return self.prefill_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first, in seconds: (total - TTFT) / (n - 1); nan for one token."""
        return _ratio(self.decode_s, len(self.tokens) - 1)

    @property
    def throughput(self) -> float:
        """New tokens per second of the whole call."""
        return _ratio(len(self.tokens), self.total_s)

    @property
    def decode_throughput(self) -> float:
        """New tokens per second after the first: (n - 1) / (total - TTFT)."""
        return _ratio(len(self.tokens) - 1, self.decode_s)


def _histogram(lengths: list[int]) -> list[int]:
    return [lengths.count(length) for length in range(max(lengths, default=0) + 1)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
