"""Arms that a serving engine decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from specdecode.bench.arms.callables import LIMIT_S, ArmError
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.run import Run
from specdecode.bench.runs.counts import Counts, Histograms, Latencies
from specdecode.bench.servers.engines import Response, Speculation
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.server import Load, Server
from specdecode.drafters.base import common_prefix

_MOST_ROUNDING = 0.2501
"""Bound of the rounding of a margin. It is two steps of bfloat16 between 16 and 32, where logits often are, and
float32's own rounding. A margin that changes by more does not change by rounding."""

_LATER, _ROUNDING_TOKENS = (1, 2, 3), 16
"""The starts of the texts that show an engine's rounding, in tokens of the prompt, and the length of their outputs."""


@dataclass(frozen=True, slots=True)
class ServerArm:
    """An arm that a server decodes, one prompt or several at a time.

    Attributes:
        spec: its entry.
        server: the server that decodes.
        lengths: lengths at which the run of a single prompt is cut.
    """

    spec: ArmSpec
    server: Server
    lengths: Sequence[int] = ()

    def open(self) -> None:
        """Start the server, or connect to it.

        Raises:
            ArmError: the server cannot be started or reached.
        """
        with self._errors():
            self.server.open()

    @property
    def requests(self) -> int:
        """The number of prompts in a run."""
        return self.spec.requests or (1 if self.spec.concurrency == 1 else 2 * self.spec.concurrency)

    def prompts(self, prompt: Sequence[int]) -> list[Sequence[int]]:
        """Return the prompts of a run: the prompt, and suffixes of it with other beginnings.

        A server's cache of prefixes is then of no use. With more requests than half of the prompt's tokens, prompts
        repeat.
        """
        return [prompt[place % max(1, len(prompt) // 2) :] for place in range(self.requests)]

    def run(self, prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        """Decode a prompt, and time it. The outputs of several prompts are concatenated.

        Raises:
            ArmError: the server fails to decode.
        """
        with self._errors():
            load = self.server.generate(
                self.prompts(prompt), max_new_tokens, self.spec.concurrency, self.spec.limit_s or LIMIT_S
            )
            return _run(load, self.lengths)

    def classify(
        self, baseline: ServerArm, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]
    ) -> Literal["tie", "bug"]:
        """Classify an output that differs from its reference arm's, by the log-probabilities of both servers.

        A margin is the difference between the log-probabilities of two tokens, which equals the difference between
        their logits. Both servers decode the prompt and some suffixes of it again, the reference arm's server twice.
        As long as they write the same tokens, they read the same tokens. So the differences between their margins are
        rounding. Where the outputs part, the choice is a tie if its margin is not larger than this rounding.

        Args:
            baseline: the arm with the expected output.
            prompt: prompt of the run.
            expected: the reference arm's outputs, concatenated.
            got: this arm's outputs, concatenated.

        Raises:
            ArmError: a server fails to decode.
        """
        # Arms with different numbers of prompts share only the first output.
        prompts = self.prompts(prompt) if self.requests == baseline.requests else [prompt]
        parted = common_prefix(expected, got)
        length = len(expected) // len(prompts)
        if len(got) != len(expected) or parted == len(expected) or length == 0:
            return "bug"
        number, place = divmod(parted, length)
        before = list(expected[number * length : parted])
        readings = self._readings(baseline, prompts[number], place + 1)
        margins = [
            abs(at[expected[parted]] - at[got[parted]])
            for one in readings
            if one.tokens[:place] == before and len(one.logprobs) > place
            if {expected[parted], got[parted]} <= (at := one.logprobs[place]).keys()
        ]
        others = [self._readings(baseline, prompt[later:], _ROUNDING_TOKENS) for later in _LATER if later < len(prompt)]
        rounding = max((change for some in (readings, *others) for change in _margin_changes(some)), default=0.0)
        return "tie" if len(margins) == len(readings) and max(margins) <= min(_MOST_ROUNDING, rounding) else "bug"

    def _readings(self, baseline: ServerArm, prompt: Sequence[int], length: int) -> list[Response]:
        """Decode a prompt with log-probabilities, twice by the reference arm and once by this arm."""
        readings = []
        for arm in (baseline, baseline, self):
            with arm._errors():
                readings.append(arm.server.logprobs(prompt, length, self.spec.limit_s or LIMIT_S))
        return readings

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Add the arm's name to errors of its server."""
        try:
            yield
        except ServerError as error:
            raise ArmError(f"{self.spec.notation.arm}: {error}") from error


def _margin_changes(readings: Sequence[Response]) -> Iterator[float]:
    """Yield the differences between margins of the first response and of each other one. The margins are those of
    written tokens, as far as both responses wrote the same tokens."""
    first, *others = readings
    for other in others:
        for place in range(common_prefix(first.tokens, other.tokens)):
            written = first.tokens[place]
            ours, theirs = (one.logprobs[place] if place < len(one.logprobs) else {} for one in (first, other))
            if written in ours and written in theirs:
                for token in ours.keys() & theirs.keys():
                    yield abs(ours[written] - ours[token] - theirs[written] + theirs[token])


def _run(load: Load, lengths: Sequence[int]) -> Run:
    tokens = [token for output in load.outputs for token in output]
    times = [(response.times[0], response.times[-1]) for response in load.responses]
    written = [len(output) for output in load.outputs]
    return Run(
        tokens=tokens,
        total_s=load.total_s,
        ttft_s=load.responses[0].times[0],
        counts=_counts(load, sum(written)),
        histograms=_histograms(load.speculation),
        latencies=Latencies(
            ttft=[first for first, _ in times],
            tpot=[(end - first) / (count - 1) for (first, end), count in zip(times, written, strict=True) if count > 1],
        ),
        cuts=[cut for length in lengths if (cut := _cut(load, length)) is not None],
    )


def _counts(load: Load, tokens: int) -> Counts:
    speculation = load.speculation or Speculation()
    first = sum(response.sizes[0] for response in load.responses)
    return Counts(
        steps=load.steps,
        target_forwards=load.steps,
        drafted=speculation.drafted,
        accepted=speculation.accepted,
        later_tokens=max(0, tokens - first),
    )


def _histograms(speculation: Speculation | None) -> Histograms:
    """Return the histograms of steps, if the engine reports the number of proposals kept at each position."""
    if speculation is None or not speculation.by_position or speculation.drafts is None:
        return Histograms()
    at_least, longest = [speculation.drafts, *speculation.by_position, 0.0], len(speculation.by_position)
    # If all drafts have the full length, the depths are known too.
    depth = [*[0] * longest, round(speculation.drafts)] if speculation.drafted == speculation.drafts * longest else []
    return Histograms(accepted=[round(more - fewer) for more, fewer in pairwise(at_least)], depth=depth)


def _cut(load: Load, length: int) -> Run | None:
    """Return the run of a single prompt as it was after `length` tokens; None if it cannot be cut there."""
    (response, *others), (output, *_) = load.responses, load.outputs
    if others or length >= len(output) or sum(response.sizes) != len(output):
        return None
    written = steps = 0
    while written < length:
        written += response.sizes[steps]
        steps += 1
    counts = Counts(steps=steps, target_forwards=steps, later_tokens=max(0, length - response.sizes[0]))
    return Run(output[:length], response.times[steps - 1], response.times[0], counts)
