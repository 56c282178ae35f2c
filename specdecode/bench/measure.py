"""Experiments in blocks: the baseline first, the arms in a shuffled order, the baseline again."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from specdecode.bench.arms import Arm, Run
from specdecode.bench.names import BASELINE
from specdecode.bench.stats import Ratio, mean_ratio, noise_floor
from specdecode.lm import LM

Check = Literal["equal", "tie", "bug"]

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of an arm within a block.

    Attributes:
        prompt: id of the prompt.
        run: the output and its times.
        check: whether the output is the baseline's ("equal"), or left it at a place where the target itself is
            undecided within its rounding ("tie"), or is wrong ("bug": its time is void).
        log_speedup: logarithm of the block's baseline time over this run's.
    """

    prompt: str
    run: Run
    check: Check
    log_speedup: float


@dataclass(slots=True)
class Results:
    """All runs of an experiment.

    Attributes:
        runs: arm by arm, in the order of the blocks; the baseline's are the first of each block.
        noise: log ratio of each block's first baseline run to its second, prompt by prompt.
        against: for an arm, the peer's arm that does the same with the same settings, where both were measured.
        synthetic: the arms whose weights or acceptance are not real: they tell costs only.
    """

    runs: dict[str, list[Measured]] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    synthetic: frozenset[str] = frozenset()

    @property
    def floor(self) -> float:
        """The A/A floor, in logarithms."""
        return noise_floor(list(self.noise.values()))

    def log_speedups(self, arm: str, over: str = BASELINE) -> dict[str, list[float]]:
        """Log speedups of an arm over another within blocks, by prompt; runs with a wrong output do not count."""
        pairs: dict[str, list[float]] = {}
        for mine, other in zip(self.runs[arm], self.runs[over], strict=True):
            if "bug" not in (mine.check, other.check):
                pairs.setdefault(mine.prompt, []).append(mine.log_speedup - other.log_speedup)
        return pairs

    def speedup(self, arm: str, over: str = BASELINE) -> Ratio:
        """The mean speedup of an arm over another, with its interval."""
        pairs = self.log_speedups(arm, over)
        if not pairs:
            return Ratio(math.nan, math.nan, math.nan)
        return mean_ratio(list(pairs.values()), floor=0.0 if arm == over else self.floor)

    def measures(self, arm: str) -> dict[str, float]:
        """The measures of an arm, as plain numbers: what tables show and files keep."""
        runs = [measured.run for measured in self.runs[arm]]
        tokens, steps = sum(len(run.tokens) for run in runs), sum(run.steps for run in runs)
        speedup = self.speedup(arm)
        measures = {
            "throughput": tokens / sum(run.total_s for run in runs),
            "speedup": speedup.value,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "ttft_s": statistics.median(run.ttft_s for run in runs),
            "tpot_s": statistics.median((run.total_s - run.ttft_s) / max(len(run.tokens) - 1, 1) for run in runs),
            "mean_acceptance_length": tokens / steps,
            "ties": float(sum(measured.check == "tie" for measured in self.runs[arm])),
            "synthetic": float(arm in self.synthetic),
            "bugs": float(sum(measured.check == "bug" for measured in self.runs[arm])),
        }
        if peer := self.against.get(arm):
            over = self.speedup(arm, over=peer)
            measures |= {"over_peer": over.value, "over_peer_low": over.low, "over_peer_high": over.high}
        generations = [run.generation for run in runs if run.generation is not None]
        if drafted := sum(generation.drafted for generation in generations):
            measures["acceptance_rate"] = sum(generation.accepted for generation in generations) / drafted
        if generations:
            measures["target_forwards_per_token"] = sum(g.target_forwards for g in generations) / tokens
            measures["draft_forwards_per_token"] = sum(g.draft_forwards for g in generations) / tokens
            measures["cache_bytes"] = float(max(generation.cache_bytes for generation in generations))
        return measures


def experiment(
    target: LM,
    arms: Sequence[Arm],
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> Results:
    """Measure the arms against the baseline, which must be among them.

    Args:
        target: the model that all arms decode.
        arms: their outputs are checked against the baseline's, run by run.
        prompts: tokens by id.
        max_new_tokens: length of every output.
        repeats: blocks for each prompt.
        seed: of the order of arms within a block.
        progress: told the number of runs done, of all runs, and what is going on.
    """
    baseline = next(arm for arm in arms if arm.name == BASELINE)
    others = [arm for arm in arms if arm is not baseline]
    total = len(arms) + len(prompts) * repeats * (len(arms) + 1)
    names = {arm.name for arm in arms}
    against = {arm.name: arm.against for arm in arms if arm.against in names}
    synthetic = frozenset(arm.name for arm in arms if arm.synthetic)
    results = Results({arm.name: [] for arm in arms}, {prompt: [] for prompt in prompts}, against, synthetic)
    done = 0

    def timed(arm: Arm, prompt: str, length: int, expected: Sequence[int]) -> Run:
        nonlocal done
        progress(done, total, f"{arm.name} on {prompt}")
        gc.collect()
        gc.disable()
        try:
            return arm.run(prompts[prompt], length, expected)
        finally:
            gc.enable()
            done += 1

    warm = next(iter(prompts))
    expected = timed(baseline, warm, _WARM_UP_TOKENS, ()).tokens
    for arm in others:
        timed(arm, warm, _WARM_UP_TOKENS, expected)
    shuffle = random.Random(seed)
    for _ in range(repeats):
        for prompt in prompts:
            first = timed(baseline, prompt, max_new_tokens, ())
            block = {
                arm.name: timed(arm, prompt, max_new_tokens, first.tokens)
                for arm in shuffle.sample(others, len(others))
            }
            last = timed(baseline, prompt, max_new_tokens, ())
            baseline_log_s = (math.log(first.total_s) + math.log(last.total_s)) / 2
            results.noise[prompt].append(math.log(first.total_s) - math.log(last.total_s))
            for name, run in {BASELINE: first, **block}.items():
                check = classify(target, prompts[prompt], first.tokens, run.tokens)
                log_speedup = 0.0 if name == BASELINE else baseline_log_s - math.log(run.total_s)
                results.runs[name].append(Measured(prompt, run, check, log_speedup))
    progress(total, total, "done")
    return results


@torch.inference_mode()
def classify(target: LM, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> Check:
    """Whether an output is the expected one; if not, whether the target was undecided where they part.

    Kernels for one row and for several round differently. The difference that this makes to the logits is measured at
    the very place: a choice between two tokens that lie closer than it is a tie, all else is a bug.
    """
    if list(expected) == list(got):
        return "equal"
    parted = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if parted is None:
        return "bug"  # not the asked length
    text = [*prompt, *expected[:parted]]

    def logits(rows: int) -> torch.Tensor:
        slots = target.new_slots(len(text))
        for piece in (text[:-rows], text[-rows:]):
            if piece:
                last = target.forward(slots, torch.tensor(piece))[-1]
        return last.double()

    one, several = logits(1), logits(min(8, len(text)))
    noise = (one - several).abs().max().item()
    margin = abs(one[expected[parted]] - one[got[parted]]).item()
    return "tie" if margin <= 2 * noise else "bug"
