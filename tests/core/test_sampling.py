from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdecode import LM, ModelDrafter, NoDraft, Sampling, SpecDecodeError, StaticTree, generate
from specdecode.core.sampling import Rng, checked_choice, most_probable
from tests.helpers.models import ARCHITECTURES, build, lm, prompt


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_a_value_outside_its_range_is_named(values: dict, sentence: str) -> None:
    """Guards against a distribution of NaN, or without mass, deep inside a generation."""
    with pytest.raises(ValueError, match=sentence):
        Sampling(**values)


@given(
    rows=st.lists(st.permutations(range(11)), min_size=1, max_size=3),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 1.0),
)
def test_the_distribution_is_that_of_transformers(
    rows: list[list[int]], temperature: float, top_k: int, top_p: float
) -> None:
    """Guards against the filters in another order, a nucleus that stops one token early, and rows that are mixed up."""
    logits = torch.tensor(rows, dtype=torch.float64) * 0.7
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probs(logits), scores.softmax(-1))


def test_a_nucleus_is_the_fewest_tokens_that_reach_its_share() -> None:
    """Guards against one token too many in a nucleus whose earlier tokens reach the share exactly."""
    distribution = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64)
    for top_p, expected in [(0.5, [0, 1, 0, 0]), (0.51, [0, 2 / 3, 1 / 3, 0]), (0.75, [0, 2 / 3, 1 / 3, 0])]:
        assert Sampling(1.0, top_p=top_p).probs(distribution.log()).tolist() == pytest.approx(expected)


def test_the_kth_token_s_equals_stay() -> None:
    """Guards against a choice among equal tokens that differs between devices, and so between target and draft."""
    assert Sampling(1.0, top_k=2).probs(torch.tensor([1.0, 3.0, 1.0, 0.0])).gt(0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 3, 0.9)])
def test_distributions_are_at_least_single_precision(sampling: Sampling) -> None:
    """Guards against distributions in half precision, whose ratios are off by a percent."""
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    for given_type, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert sampling.probs(logits.to(given_type)).dtype == expected


def test_greedy_ranks_by_the_plain_softmax() -> None:
    """Guards against a division by the temperature of zero."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert Sampling().greedy
    assert torch.equal(Sampling().probs(logits), logits.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-12, 1e-37, 1e-38, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("narrowed", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_the_coldest_distributions_hold_the_most_probable_token(
    temperature: float, narrowed: dict, dtype: torch.dtype
) -> None:
    """Guards against logits that overflow when divided by a tiny temperature: infinities give a distribution of NaN."""
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.5], [-9.0, -torch.inf, -7.0, -8.0], [5e4, -5e4, 0.0, 4e4]], dtype=dtype)
    distribution = Sampling(temperature, **narrowed).probs(logits)
    assert distribution.tolist() == [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    equals = Sampling(temperature).probs(torch.tensor([1.0, 1.0], dtype=dtype))
    assert equals.tolist() == [0.5, 0.5]


NOTHING = {
    "nan": [0.0, torch.nan, 1.0],
    "infinite": [0.0, torch.inf, 1.0],
    "all masked": [-torch.inf] * 3,
}


@pytest.mark.parametrize("logits", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.9)], ids=str)
def test_nothing_is_drawn_from_logits_that_are_not_finite(logits: list[float], sampling: Sampling) -> None:
    """Guards against NaN logits that silently decode to the last token of the vocabulary for ever."""
    distribution = sampling.probs(torch.tensor([logits, [0.0, 0.0, 9e9]]))
    assert Rng(0).draw(distribution).tolist() == [-1, 2]
    with pytest.raises(SpecDecodeError, match=r"logits are NaN, infinite or all -inf here.*run it in another dtype"):
        checked_choice(-1)
    assert checked_choice(2) == 2


def test_the_most_probable_of_no_number_is_none() -> None:
    """Guards against greedy decoding of NaN logits to the first token, because PyTorch ranks NaN highest. An infinity
    ranks highest everywhere.
    """
    rows = torch.tensor([*NOTHING.values(), [1.0, 2.0, 2.0]])
    assert most_probable(rows).tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["greedy", "sampled"])
def test_a_model_without_finite_logits_is_told_and_a_draft_without_them_changes_nothing(sampling: Sampling) -> None:
    """Guards against one token repeated for ever where float16 overflows, and against a draft's NaN in the target's
    distribution.
    """
    model = build(ARCHITECTURES["llama"])
    damaged = LM(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan
    with pytest.raises(SpecDecodeError, match="logits are NaN"):
        generate(damaged, [5, 77, 9], sampling=sampling, max_new_tokens=4)
    target, start = lm("llama"), [*prompt(), 77]
    for shape in (StaticTree((2, 2)), StaticTree((1, 1))):
        drafted = generate(target, start, drafter=ModelDrafter(damaged, shape), sampling=sampling, max_new_tokens=12)
        plain = generate(target, start, drafter=NoDraft(), sampling=sampling, max_new_tokens=12)
        if sampling.greedy:
            assert drafted.tokens == plain.tokens
        else:
            assert drafted.accepted == 0
            assert drafted.drafted == 0 or shape.branching == (1, 1), "only a single draw is not looked at first"
            assert len(drafted.tokens) == 12


class FixedRng(Rng):
    """A generator with given uniform numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *uniform: float) -> None:
        super().__init__(0)
        numbers = torch.tensor(uniform, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda shape, **_: numbers.reshape(shape))


@pytest.mark.parametrize(
    ("uniform", "index"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.4999, 3), (0.5, 4), (1 - 2**-53, 4)]
)
def test_a_draw_inverts_the_cumulative_sum_exactly(monkeypatch: pytest.MonkeyPatch, uniform: float, index: int) -> None:
    """Guards against an interval that is closed at the wrong end, where a token of probability zero is drawn."""
    distribution = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    for scale in (1.0, 3.0):
        assert int(FixedRng(monkeypatch, uniform).draw(distribution * scale)) == index


@pytest.mark.parametrize(("probability", "uniform", "heads"), [(0.25, 0.2499, True), (0.25, 0.25, False)])
def test_a_coin_falls_as_often_as_it_should(
    monkeypatch: pytest.MonkeyPatch, probability: float, uniform: float, heads: bool
) -> None:
    """Guards against a coin of probability zero that can win, and one of probability one that can lose."""
    assert FixedRng(monkeypatch, uniform).coin(probability) is heads
    assert FixedRng(monkeypatch, uniform).coin(torch.tensor(probability)) is heads
    assert FixedRng(monkeypatch, 0.0).coin(0.0) is False
    assert FixedRng(monkeypatch, 1 - 2**-53).coin(1.0) is True


@given(
    distributions=st.lists(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.3, 1.0]), min_size=6, max_size=6), min_size=1),
    seed=st.integers(0, 2**32),
)
def test_what_has_no_probability_is_never_drawn(distributions: list[list[float]], seed: int) -> None:
    """Guards against a token outside top-k, or a sibling drawn twice without replacement."""
    distribution = torch.tensor([row if any(row) else [1.0] * 6 for row in distributions])
    drawn = Rng(seed).draw(distribution)
    assert drawn.shape == distribution.shape[:-1]
    assert (distribution.gather(-1, drawn.unsqueeze(-1)) > 0).all()


def test_every_row_is_drawn_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against rows that share one random number: siblings' branches would repeat each other."""
    distribution = torch.full((3, 4), 0.25)
    assert FixedRng(monkeypatch, 0.1, 0.9, 0.3).draw(distribution).tolist() == [0, 3, 1]


def test_a_seed_fixes_the_randomness() -> None:
    """Guards against use of the global generator: a second generation, or other code, would change the first one's
    tokens.
    """
    distribution = torch.full((64, 50), 0.02)
    first = Sampling(1.0, seed=3).rng()
    torch.manual_seed(99)
    second = Sampling(1.0, seed=3).rng()
    assert torch.equal(first.draw(distribution), second.draw(distribution))
    assert [first.coin(0.5) for _ in range(30)] == [second.coin(0.5) for _ in range(30)]
    assert not torch.equal(
        Sampling(1.0, seed=4).rng().draw(distribution), Sampling(1.0, seed=3).rng().draw(distribution)
    )
    assert not torch.equal(Sampling(1.0).rng().draw(distribution), Sampling(1.0).rng().draw(distribution))
