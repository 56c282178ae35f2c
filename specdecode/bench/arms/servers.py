"""Arms that a serving engine decodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from specdecode.bench.arms.callables import LIMIT_S, ArmError
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.run import Run
from specdecode.bench.runs.counts import Counts, Histograms, Latencies
from specdecode.bench.servers.engines import Response, Told
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.server import Load, Server
from specdecode.drafters.base import common_prefix

_MOST_ROUNDING = 0.2501
"""Two steps of bfloat16 between 16 and 32, where logits often are, and float32's own rounding: a margin that moves by
more does not move by rounding."""

_LATER, _ROUNDING_TOKENS = (1, 2, 3), 16
"""Where the texts begin, in tokens, that show how an engine rounds, and how long their outputs are."""


@dataclass(frozen=True, slots=True)
class ServerArm:
    """An arm that a server decodes, a prompt alone or several at a time.

    Attributes:
        spec: its entry.
        server: that decodes.
        lengths: at which the run of a single prompt is cut.
    """

    spec: ArmSpec
    server: Server
    lengths: Sequence[int] = ()

    @property
    def alone(self) -> bool:
        """Whether the server runs while no other does that is to run alone."""
        return self.server.spec.alone

    @property
    def takes_text(self) -> bool:
        """Whether prompts go to the server as text."""
        return self.server.spec.prompt == "text"

    @property
    def about(self) -> str:
        """The engine, its version and the model, once the server has been reached."""
        return self.server.about

    @property
    def pids(self) -> Collection[int]:
        """The ids of the server's processes here that this process has not started."""
        return self.server.pids

    def open(self) -> None:
        """Start the server, or reach it.

        Raises:
            ArmError: that fails.
        """
        with self._errors():
            self.server.open()

    def close(self) -> None:
        """End the server, or leave it."""
        self.server.close()

    @property
    def requests(self) -> int:
        """The number of prompts that a run decodes."""
        return self.spec.requests or (1 if self.spec.concurrency == 1 else 2 * self.spec.concurrency)

    def prompts(self, prompt: Sequence[int]) -> list[Sequence[int]]:
        """Return the prompts that a run decodes: a prompt, and later beginnings of it, which share no first token."""
        return [prompt[place % max(1, len(prompt) // 2) :] for place in range(self.requests)]

    def run(self, prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        """Decode a prompt, and time it. The outputs of several prompts stand one behind the other.

        Raises:
            ArmError: the server does not decode it.
        """
        with self._errors():
            load = self.server.generate(
                self.prompts(prompt), max_new_tokens, self.spec.concurrency, self.spec.limit_s or LIMIT_S
            )
            return _run(load, self.lengths)

    def classify(
        self, baseline: ServerArm, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]
    ) -> Literal["tie", "bug"]:
        """Classify an output that is not its baseline's, by the log-probabilities that both servers tell.

        A margin is by how much the log-probabilities of two tokens differ, which is what their logits differ by. Both
        servers decode the prompt again, and some more of its later beginnings, the baseline twice. As long as they
        write the same, they read the same, so what their margins differ by is rounding. Where the outputs part, the
        choice is a tie if its margin is no more than that.

        Args:
            baseline: whose output is expected.
            prompt: of the run.
            expected: the baseline's outputs, one behind the other.
            got: this arm's.

        Raises:
            ArmError: a server does not decode it.
        """
        # With another number of prompts they have the first output alone in common.
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
        """Decode a prompt with log-probabilities, twice by the baseline and once by this arm."""
        readings = []
        for arm in (baseline, baseline, self):
            with arm._errors():
                readings.append(arm.server.logprobs(prompt, length, self.spec.limit_s or LIMIT_S))
        return readings

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Name the arm in the sentence about its server."""
        try:
            yield
        except ServerError as error:
            raise ArmError(f"{self.spec.notation.arm}: {error}") from error


def _margin_changes(readings: Sequence[Response]) -> Iterator[float]:
    """Yield what margins of the written tokens differ by between the first response and the others, while these write
    the same."""
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
        histograms=_histograms(load.told),
        latencies=Latencies(
            ttft=[first for first, _ in times],
            tpot=[(end - first) / (count - 1) for (first, end), count in zip(times, written, strict=True) if count > 1],
        ),
        cuts=[cut for length in lengths if (cut := _cut(load, length)) is not None],
    )


def _counts(load: Load, tokens: int) -> Counts:
    told = load.told or Told()
    first = sum(response.sizes[0] for response in load.responses)
    return Counts(
        steps=load.steps,
        target_forwards=load.steps,
        drafted=told.drafted,
        accepted=told.accepted,
        later_tokens=max(0, tokens - first),
    )


def _histograms(told: Told | None) -> Histograms:
    """Return how many steps kept how many proposals, as far as the engine tells how many kept one at each position."""
    if told is None or not told.by_position or told.drafts is None:
        return Histograms()
    at_least, longest = [told.drafts, *told.by_position, 0.0], len(told.by_position)
    # Where all drafts are as long as they may be, their lengths are known, too.
    depth = [*[0] * longest, round(told.drafts)] if told.drafted == told.drafts * longest else []
    return Histograms(accepted=[round(more - fewer) for more, fewer in pairwise(at_least)], depth=depth)


def _cut(load: Load, length: int) -> Run | None:
    """Return the run of a single prompt as it was when so many tokens had come."""
    (response, *others), (output, *_) = load.responses, load.outputs
    if others or length >= len(output) or sum(response.sizes) != len(output):
        return None
    written = steps = 0
    while written < length:
        written += response.sizes[steps]
        steps += 1
    counts = Counts(steps=steps, target_forwards=steps, later_tokens=max(0, length - response.sizes[0]))
    return Run(output[:length], response.times[steps - 1], response.times[0], counts)
