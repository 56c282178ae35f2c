"""The result of a generation: its tokens, and the counters and times of each step."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """The counters and times of one step: a proposal and the target forward over it.

    Attributes:
        drafted: number of proposed tokens.
        depth: number of tokens on the longest path of the proposal.
        rows: number of tokens that the target read: the root, the proposals and, in the first step, the end of the
            prompt.
        accepted: number of proposed tokens that were committed.
        emitted: number of committed tokens: the accepted tokens and the target's own token, cut at a stop token or the
            length limit.
        draft_forwards: number of forwards of the draft model.
        draft_s: seconds of proposing, on the host clock. On a GPU, `verify_s` includes the wait for queued draft work.
        verify_s: seconds of the target's forward and of the acceptance.
        total_s: seconds of the whole step.
        cache_bytes: bytes of KV in the target's slots at the end of the step.
        peak_cache_bytes: bytes of KV in the target's slots before rejected proposals and evicted tokens were dropped.
        attended_bytes: bytes of KV that the target's forward attended to.
        compressions: number of evictions by the cache policy at the end of the step.
        allowed: largest depth of a draft in this step: no step goes beyond the end of the text, or a length at which
            the policy evicts.
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
    cache_bytes: int = 0
    peak_cache_bytes: int = 0
    attended_bytes: int = 0
    compressions: int = 0
    allowed: int = sys.maxsize


@dataclass(slots=True)
class Generation:
    """The new tokens of one prompt, with the counters and times of their steps.

    Attributes:
        tokens: the new token ids. If a stop token ended the generation, it is the last of them.
        finish_reason: "length" at the length limit; "stop" after a stop token or a stop string.
        steps: the steps in order. The target forward of the first step also reads the rest of the prompt.
        prompt_tokens: number of tokens of the prompt.
        prefill_forwards: number of target forwards over parts of a long prompt, before the first step.
        prefill_forwards_s: seconds of these forwards.
        prefill_compressions: number of evictions by the cache policy before the first step.
        prefill_s: seconds from the call to the first committed tokens.
        decode_s: seconds from the first committed tokens to the end.
        capture_s: seconds of capturing CUDA graphs, which no other time includes.
        logprobs: natural logarithm of each new token's probability under the target's own distribution, before
            temperature, top-k and top-p; None unless requested.
        retries: number of steps that were made again without proposals, because one overflowed in the target.
        target_forwards: number of forwards of the target: those before the first step, one for each step, and retries.
        draft_forwards: number of forwards of the draft model.
        drafted: number of proposed tokens.
        accepted: number of proposed tokens that were committed.
        total_s: seconds of the whole call, without `capture_s`.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["length", "stop"] = "length"
    steps: list[Step] = field(default_factory=list)
    prompt_tokens: int = 0
    prefill_forwards: int = 0
    prefill_forwards_s: float = 0.0
    prefill_compressions: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    capture_s: float = 0.0
    logprobs: list[float] | None = None
    retries: int = 0

    @property
    def target_forwards(self) -> int:
        return self.prefill_forwards + len(self.steps) + self.retries

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
    def rejections(self) -> int:
        """Number of steps that accepted fewer tokens than the depth of their tree."""
        return sum(step.accepted < step.depth for step in self.steps)

    @property
    def compressions(self) -> int:
        """Number of evictions by the cache policy."""
        return self.prefill_compressions + sum(step.compressions for step in self.steps)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV in the target's slots at the end."""
        return self.steps[-1].cache_bytes if self.steps else 0

    @property
    def peak_cache_bytes(self) -> int:
        """Largest number of bytes of KV in the target's slots in any step, proposals included."""
        return max((step.peak_cache_bytes for step in self.steps), default=0)

    @property
    def attended_bytes(self) -> int:
        """Bytes of KV that the target attended to, summed over the steps."""
        return sum(step.attended_bytes for step in self.steps)

    @property
    def draft_s(self) -> float:
        """Seconds of proposing."""
        return sum(step.draft_s for step in self.steps)

    @property
    def verify_s(self) -> float:
        """Seconds of the target's forwards, including the forwards over the prompt, and of the acceptance."""
        return self.prefill_forwards_s + sum(step.verify_s for step in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens over drafted tokens, from 0 to 1; nan if nothing was drafted."""
        return _ratio(self.accepted, self.drafted)

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per step (tau in the literature), at most depth + 1; nan without steps."""
        return _ratio(len(self.tokens), len(self.steps))

    @property
    def acceptance_by_position(self) -> list[float]:
        """Acceptance at each depth, from depth 1: the share of trees with a committed proposal there.

        Only trees that reach the depth count.
        """
        deepest = max((step.depth for step in self.steps), default=0)
        return [
            _ratio(sum(s.accepted >= d for s in self.steps), sum(s.depth >= d for s in self.steps))
            for d in range(1, deepest + 1)
        ]

    @property
    def accepted_lengths(self) -> list[int]:
        """Histogram of accepted proposals: entry i is the number of steps that accepted i proposals."""
        return histogram([step.accepted for step in self.steps])

    @property
    def depths(self) -> list[int]:
        """Histogram of tree depths: entry i is the number of steps with a tree of depth i."""
        return histogram([step.depth for step in self.steps])

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
        """New tokens per second of the whole call: n / total."""
        return _ratio(len(self.tokens), self.total_s)

    def until(self, count: int) -> Generation:
        """Return the generation of the first `count` tokens, with the steps that committed them.

        A generation with this length limit would be the same, except that it would not draft past its end.

        Args:
            count: number of tokens to keep, from 1 to `len(tokens)`.

        Raises:
            ValueError: there are fewer tokens, or `count` is not positive.
        """
        if not 1 <= count <= len(self.tokens):
            raise ValueError(f"{count} tokens were asked for, but the generation has {len(self.tokens)}")
        steps: list[Step] = []
        left = count
        for step in self.steps:
            emitted = min(step.emitted, left)
            steps.append(replace(step, emitted=emitted, accepted=min(step.accepted, emitted)))
            left -= emitted
            if not left:
                break
        return replace(
            self,
            tokens=self.tokens[:count],
            finish_reason=self.finish_reason if count == len(self.tokens) else "length",
            steps=steps,
            decode_s=self.decode_s - sum(step.total_s for step in self.steps[len(steps) :]),
            logprobs=None if self.logprobs is None else self.logprobs[:count],
        )


def histogram(lengths: list[int]) -> list[int]:
    """Return the histogram of lengths: entry i is the number of times that the length i occurs."""
    return [lengths.count(length) for length in range(max(lengths, default=0) + 1)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
