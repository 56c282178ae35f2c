"""The expected speedup of a chain, against an enumeration of all outcomes with fractions."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.history import History
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.speedup_model import acceptance, chain_speedup, expected_tokens, modelled, study_speedup
from specdecode.bench.report.tables import by_model, limits
from specdecode.bench.runs.counts import Histograms, RowCounts, RowSeconds
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile

ALPHAS = [Fraction(0), Fraction(1, 3), Fraction(4, 5), Fraction(1)]


def every_step(alpha: Fraction, depth: int) -> list[tuple[Fraction, int, int]]:
    """Return the probability, accepted proposals and rejections of each way in which a draft can be judged."""
    found = []
    for verdicts in product([True, False], repeat=depth):
        weight = math.prod((alpha if verdict else 1 - alpha for verdict in verdicts), start=Fraction(1))
        accepted = verdicts.index(False) if False in verdicts else depth
        found.append((weight, accepted, int(accepted < depth)))
    return found


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_expected_tokens_are_those_of_every_way_in_which_a_step_can_go(alpha: Fraction, depth: int) -> None:
    """Guards against an expectation that is off by the bonus token, or that fails where everything is accepted."""
    tokens = expected_tokens(alpha, depth)
    assert tokens == sum(weight * (accepted + 1) for weight, accepted, _ in every_step(alpha, depth))
    if alpha < 1:
        assert tokens == (1 - alpha ** (depth + 1)) / (1 - alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_chains_speedup_is_tokens_over_time(alpha: Fraction) -> None:
    """Guards against a model in which every draft is as deep as the deepest, and a cost that is left out."""
    depths, draft, verify = [3, 0, 5, 0, 2], Fraction(1, 10), Fraction(6, 5)
    tokens, seconds = Fraction(0), Fraction(0)
    for depth, count in enumerate(depths):
        for weight, accepted, _ in every_step(alpha, depth):
            tokens += count * weight * (accepted + 1)
            seconds += count * weight * (depth * draft + verify)
    assert chain_speedup(alpha, depths, draft, verify) == tokens / seconds
    if alpha < 1:
        theorem = (1 - alpha**5) / ((1 - alpha) * (4 * draft + 1))
        assert chain_speedup(alpha, [0, 0, 0, 0, 9], draft, Fraction(1)) == theorem


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_approximation_promises_what_independent_proposals_would_give(alpha: Fraction) -> None:
    """Guards against a formula other than the study's, which also counts verdicts behind a rejection."""
    depth, draft = 4, Fraction(1, 8)
    tokens = Fraction(0)
    for verdicts in product([True, False], repeat=depth):
        weight = math.prod((alpha if verdict else 1 - alpha for verdict in verdicts), start=Fraction(1))
        tokens += weight * (1 + sum(verdicts))
    assert study_speedup(alpha, depth, draft) == tokens / (1 + depth * draft)
    exact = chain_speedup(alpha, [0] * depth + [1], draft, Fraction(1))
    assert (study_speedup(alpha, depth, draft) > exact) == (0 < alpha < 1)


def test_acceptance_is_the_likeliest() -> None:
    """Guards against accepted over drafted as the rate, which falls with K: proposals behind a rejection were never
    judged.
    """
    for alpha, depth in product(ALPHAS, [1, 2, 5]):
        steps = every_step(alpha, depth)
        accepted = sum(weight * count for weight, count, _ in steps)
        rejected = sum(weight * count for weight, _, count in steps)
        assert acceptance(float(accepted), float(rejected)) == pytest.approx(float(alpha))
    seen = [(0, 1), (2, 1), (3, 0), (3, 0), (1, 1)]  # drafts of three tokens: (accepted, rejections)
    estimate = acceptance(9, 3)

    def likelihood(alpha: float) -> float:
        return math.prod(alpha**accepted * (1 - alpha) ** rejected for accepted, rejected in seen)

    assert all(likelihood(estimate) > likelihood(estimate + off) for off in (-0.1, -0.01, 0.01, 0.1))
    assert math.isnan(acceptance(0, 0))


def run(**arms: dict[str, Any]) -> RunFile:
    """Return a run with known costs.

    Plain steps take a second. The ten steps after the first draft at 0.1 s a proposal and verify in 1.5 s. Of twenty
    judged proposals, fifteen are accepted.
    """
    records = {}
    for arm, options in {"ar": {}, **arms}.items():
        k = options["k"] if isinstance(options.get("k"), int) else 0
        counts = {"runs": 1, "tokens": 31, "steps": 11, "drafted": 11 * k, "later_tokens": 30}
        counts |= {"accepted": 15, "rejections": 5} if k else {"accepted": 0, "rejections": 0}
        later = {"later_draft": k, "later_verify": 15 if k else 30}
        if not k:
            counts |= {"steps": 31}
        seconds = {"total": 20.0, "ttft": 3.0, "draft": 0.5 if k else 0.0, "verify": 5.0, "overhead": 1.0, **later}
        histograms = {"accepted": [5, 0, 6], "depth": [0] * k + [11]}
        row = Row(math.log(1.25) if k else 0.0, RowCounts(**counts), RowSeconds(**seconds), Histograms(**histograms))
        records[arm.replace("_", "-")] = ArmRecord({"p/0": row}, peer="peer" in options, options=options)
    return RunFile(Path(), Header(Identity("a", "t", "d", "float32", "p"), 31, {"p/0": "x"}, 0.01), records)


MODEL, LOOKUP = {"drafter": "model"}, {"drafter": "lookup"}


def test_models_take_an_arms_own_costs() -> None:
    """Guards against a model that uses another arm's costs, or those of the first step, which carries the prompt."""
    (rows,) = modelled(run(linear_k4=MODEL | {"k": 4}, linear_k2=MODEL | {"k": 2})).values()
    assert [row.arm for row in rows] == ["linear-k2", "linear-k4"]
    for row, k in zip(rows, (2, 4), strict=True):
        assert row.k == k
        assert row.acceptance == 0.75
        assert row.study == pytest.approx((1 + 0.75 * k) / (1 + 0.1 * k))
        assert row.exact == pytest.approx((1 - 0.75 ** (k + 1)) / 0.25 / (0.1 * k + 1.5))
        assert row.steps == pytest.approx(3 / (0.1 * k + 1.5))
        assert row.measured.value == pytest.approx(1.25)


def test_families_differ_in_k_alone() -> None:
    """Guards against a curve through arms of two methods or two caches, or through trees, which are no chains."""
    bounded = {"policy": "sink-window", "cache": 64}
    found = modelled(
        run(
            linear_k2=MODEL | {"k": 2, "against": "hf-assisted"},
            linear_k4=MODEL | {"k": 4},
            streaming_k2_64=MODEL | bounded | {"k": 2},
            streaming_k4_64=MODEL | bounded | {"k": 4},
            lookup=LOOKUP | {"k": 4},
            tree_k2=MODEL | {"k": 2, "shape": "static"},
            tree_k4=MODEL | {"k": 4, "shape": "static"},
            hf_k2={"peer": "assisted", "k": 2},
            hf_k4={"peer": "assisted", "k": 4},
            adaptive=MODEL | {"controller": "adaptive"},
        )
    )
    assert {name: [row.arm for row in rows] for name, rows in found.items()} == {
        "linear": ["linear-k2", "linear-k4"],
        "streaming-64": ["streaming-k2-64", "streaming-k4-64"],
    }


@pytest.mark.parametrize("k", ["4", [4], 4.5])
def test_what_is_no_k_makes_no_family(k: object) -> None:
    """Guards against a traceback for a run file of another tool with an odd K."""
    assert modelled(run(linear_k2=MODEL | {"k": 2}, linear_k4=MODEL | {"k": k})) == {}


def test_reports_show_the_models_where_there_are_families() -> None:
    """Guards against a model's promise without the measurement beside it, and an empty table elsewhere."""
    with_, without = run(linear_k4=MODEL | {"k": 4}, linear_k2=MODEL | {"k": 2}), run(linear_k4=MODEL | {"k": 4})
    past = History([], "none")
    assert by_model(with_).rows[0] == ["linear-k2", "2", "75%", "2.08", "1.36", "1.76", "1.25 [1.24, 1.26]"]
    for tell in (markdown, latex):
        assert "2.08" in tell(with_, "title", "", [], past)
        assert "exact" not in tell(without, "title", "", [], past)
    pages = [document("title", section(made, "title", "", [], past)) for made in (with_, without)]
    assert ["By the model" in page for page in pages] == [True, False]


def test_reports_split_the_speedup_into_what_limits_it() -> None:
    """Guards against factors whose product is not the speedup, and a factor in another's column."""
    made, past = run(linear_k2=MODEL | {"k": 2}), History([], "none")
    # 31 / 11 times fewer steps, of 6.5 / 11 s instead of 6.0 / 31 s. Logarithmic means weigh the parts of a step.
    assert limits(made).rows == [["linear-k2", "2.71", "0.92", "0.44", "0.85", "0.92"]]
    assert limits(made).columns[2].name == "drafting"
    for page in (markdown(made, "title", "", [], past), document("title", section(made, "title", "", [], past))):
        assert "0.80 costs a fifth of the speed" in page
    assert limits(run(lookup=LOOKUP)).rows == []
    assert limits(replace(made, arms={"linear-k2": made.arms["linear-k2"]})).rows == []
