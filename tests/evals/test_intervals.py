"""The promises of the evals' intervals and verdicts."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from specdecode.bench.runs.statistics import Estimate, detectable
from specdecode.evals.intervals import mcnemar, paired_loss, ratio_of_sums, wilson
from specdecode.evals.margins import Outcome, non_inferior


def test_long_documents_weigh_more() -> None:
    """Guards against a perplexity computed from a mean of documents' means."""
    assert ratio_of_sums([1.0, 30.0], [10, 100]).value == pytest.approx(31 / 110)


@pytest.mark.parametrize("documents", [5, 12])
def test_the_interval_covers_the_truth_with_few_documents_too(documents: int) -> None:
    """Guards against intervals over tokens, which are many and alike within a document, and against the percentile
    interval of few documents, which covers 83 % with five.
    """
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        tokens = random.integers(50, 150, documents)
        means = random.normal(0.3, 0.2, documents)
        sums = [float(random.normal(mean, 1.0, count).sum()) for mean, count in zip(means, tokens, strict=True)]
        cost = ratio_of_sums(sums, [float(count) for count in tokens])
        covered += cost.low <= 0.3 <= cost.high
    assert 180 <= covered <= 199


@pytest.mark.parametrize("documents", [1, 4])
def test_a_few_documents_say_nothing_of_others(documents: int) -> None:
    """Guards against a verdict from a sample without spread, or with too few documents."""
    cost = ratio_of_sums([1.0] * documents, [10.0] * documents)
    assert cost.value == 0.1
    assert non_inferior(cost, 100.0) is Outcome.INCONCLUSIVE
    assert non_inferior(ratio_of_sums([1.0] * 5, [10.0] * 5), 100.0) is Outcome.PASS


def test_a_cost_passes_only_if_its_whole_interval_is_within_the_margin() -> None:
    """Guards against a verdict by the estimate alone, or by the wrong end of the interval."""
    cost = Estimate(0.1, 0.05, 0.15)
    assert [non_inferior(cost, margin) for margin in (0.16, 0.12, 0.04)] == [
        Outcome.PASS,
        Outcome.INCONCLUSIVE,
        Outcome.FAIL,
    ]
    assert f"{cost:.3f}" == "0.100 [0.050, 0.150]"


def test_the_detectable_cost_is_told_from_none_nine_times_in_ten() -> None:
    """Guards against a stated power that the interval does not reach."""
    random = np.random.default_rng(3)

    def measured(cost: float) -> Estimate:
        return ratio_of_sums(list(100 * random.normal(cost, 0.05, 30)), [100.0] * 30)

    promised = float(np.mean([detectable(measured(0.0)) for _ in range(40)]))
    told = sum(measured(promised).low > 0 for _ in range(200)) / 200
    assert 0.84 < told < 0.96


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (3, 3), (9, 2), (1, 4)])
def test_mcnemar_is_what_all_ways_to_flip_say(lost: int, won: int) -> None:
    """Guards against a one-sided p-value, and against a p-value above 1 for an even split."""
    flips = lost + won
    ways = [sum(way) for way in product((0, 1), repeat=flips)]
    uneven = sum(abs(way - flips / 2) >= abs(lost - flips / 2) for way in ways) / 2**flips
    assert mcnemar(lost, won) == pytest.approx(uneven)
    assert mcnemar(won, lost) == mcnemar(lost, won) <= 1.0


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    # From printed tables.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share(passed: int, count: int, low: float, high: float) -> None:
    """Guards against an interval without a width where all tasks fail, and one that leaves [0, 1]."""
    share = wilson(passed, count)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert share.value == passed / count
    other = wilson(count - passed, count)
    assert (1 - other.high, 1 - other.low) == (pytest.approx(share.low), pytest.approx(share.high))


@pytest.mark.parametrize(("lose", "win"), [(0.0, 0.0), (0.1, 0.1), (0.3, 0.05), (0.02, 0.0), (0.5, 0.4)])
@pytest.mark.parametrize("count", [8, 30])
def test_the_interval_of_a_paired_loss_covers_the_truth(lose: float, win: float, count: int) -> None:
    """Guards against paired tasks compared as two samples, and against a bootstrap, which proves no loss from a few
    tasks without a flip.
    """
    covered = 0.0
    for lost, won in product(range(count + 1), repeat=2):
        if lost + won <= count:
            loss = paired_loss(lost, won, count)
            ways = math.comb(count, lost) * math.comb(count - lost, won)
            probability = ways * lose**lost * win**won * (1 - lose - win) ** (count - lost - won)
            covered += probability * (loss.low - 1e-9 <= lose - win <= loss.high + 1e-9)
    assert covered > 0.93


def test_a_loss_has_its_sign_and_its_width() -> None:
    """Guards against flips that are counted the wrong way round, and a verdict from a few tasks."""
    assert paired_loss(6, 1, 20).value == 0.25
    ends, mirrored = paired_loss(6, 1, 20), paired_loss(1, 6, 20)
    assert (ends.low, ends.high) == (pytest.approx(-mirrored.high), pytest.approx(-mirrored.low))
    assert ends.low < 0.0 < ends.high
    assert paired_loss(9, 0, 20).low > 0.0
    assert paired_loss(0, 0, 8).high == pytest.approx(1.96**2 / (8 + 1.96**2), abs=1e-4)
    assert non_inferior(paired_loss(0, 0, 8), 0.1) is Outcome.INCONCLUSIVE
    assert non_inferior(paired_loss(0, 0, 80), 0.1) is Outcome.PASS
    assert paired_loss(5, 0, 5).high == 1.0
    assert paired_loss(0, 5, 5).low == -1.0


def test_what_is_no_sample_is_refused() -> None:
    """Guards against an estimate from no data: it is NaN and fails no comparison."""
    with pytest.raises(ValueError, match="0 and 0 documents"):
        ratio_of_sums([], [])
    with pytest.raises(ValueError, match="-1 tasks lost"):
        mcnemar(-1, 0)
    with pytest.raises(ValueError, match="0 of 0 tasks"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="3 tasks lost and 2 won of 4"):
        paired_loss(3, 2, 4)
    assert math.isinf(ratio_of_sums([1.0], [1.0]).high)
