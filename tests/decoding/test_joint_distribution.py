"""The distribution of the first sampled tokens through the real decoder with its caches.

Every random decision is enumerated: the drawn drafts, the acceptances, and the tokens after them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from specdecode import (
    AdaptiveK,
    BestFirstTree,
    Cascade,
    Chain,
    DraftTree,
    FixedK,
    HeadDrafter,
    HeavyHitter,
    KeepAll,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    ReplayDrafter,
    Sampling,
    SinkWindow,
    StaticTree,
    generate,
)
from specdecode.controllers.base import Controller, Limit
from specdecode.drafters.base import Context, Drafter
from specdecode.heads.bound import BoundHead, untrained
from specdecode.policies.base import CachePolicy
from tests.helpers.enumeration import BranchRng, distribution_of
from tests.helpers.joint_distribution import (
    PROMPT,
    VOCABULARY,
    distance,
    enumerated_model,
    target_distribution,
)
from tests.helpers.strategies import Moody

pytestmark = pytest.mark.usefixtures("unchecked")


def decoded_distribution(
    monkeypatch: pytest.MonkeyPatch,
    drafter: Drafter,
    sampling: Sampling,
    length: int,
    policy: CachePolicy = KeepAll(),
    controller: Callable[[], Controller] = functools.partial(FixedK, 2),
) -> dict[tuple[int, ...], float]:
    """Return the distribution of decoded texts. One drafter serves all branches: state from one must not affect the
    next.
    """

    def run(rng: BranchRng) -> tuple[int, ...]:
        monkeypatch.setattr(Sampling, "rng", lambda self, *ranks: rng)
        result = generate(
            enumerated_model(0, layers=2),
            PROMPT,
            drafter=drafter,
            controller=controller(),
            policy=policy,
            sampling=sampling,
            max_new_tokens=length,
        )
        return tuple(result.tokens)

    return distribution_of(run)


@dataclass
class Early:
    """A drafter that drafts for the first token too: one token less gives a fifth of the branches."""

    inner: Drafter

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        return self.inner.propose(replace(context, first=False), limit)


def drafters() -> dict[str, Drafter]:
    draft = enumerated_model(1)
    return {
        "none": NoDraft(),
        "lookup": PromptLookup(),
        "lookup-tree": PromptLookup(max_ngram=1, branches=2),
        "cascade": Cascade(PromptLookup(min_ngram=2), ModelDrafter(draft, StaticTree((2, 1)))),
        "chain": ModelDrafter(draft, Chain()),
        "static-tree": ModelDrafter(draft, StaticTree((2, 1))),
        "wide-tree": ModelDrafter(draft, StaticTree((3,))),
        "best-first-tree": ModelDrafter(draft, BestFirstTree(nodes=4, threshold=0.01)),
        # A replay replaces what its drafter has drawn. A drawn tree would add hundreds of branches with the same
        # proposals.
        "replay": ReplayDrafter(ModelDrafter(draft, Chain()), [*PROMPT, 0, 2, 4], acceptance=0.5),
        "replay-tree": ReplayDrafter(
            ModelDrafter(draft, BestFirstTree(nodes=4, threshold=0.01)), [*PROMPT, 0, 2, 4], acceptance=0.5
        ),
        # The vocabulary is cut before any token is drawn, so one shape shows it.
        "wider-vocabulary": ModelDrafter(enumerated_model(1, VOCABULARY + 3), Chain()),
        "narrower-vocabulary": ModelDrafter(enumerated_model(1, VOCABULARY - 1), StaticTree((2, 1))),
        "head-chain": HeadDrafter(head()),
        "head-tree": HeadDrafter(head(), StaticTree((2, 1))),
    }


@functools.cache
def head() -> BoundHead:
    """Bind a head to the target of `decoded_distribution`. It cannot propose all tokens."""
    target = enumerated_model(0, layers=2)
    untrained_head = untrained(target)
    untrained_head.tokens = torch.tensor([4, 0, 3])
    return BoundHead(untrained_head, target)


@pytest.mark.parametrize(
    ("sampling", "length"),
    [
        # Models do not draft the first token, nothing drafts the last one: two tokens of a tree need a text of four.
        (Sampling(0.8, top_k=2), 4),
        (Sampling(0.8, top_k=3, top_p=0.9), 3),
        (Sampling(0.8), 2),
        (Sampling(1.5, top_p=0.7), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", drafters().keys())
def test_the_distribution_is_that_of_plain_sampling(
    monkeypatch: pytest.MonkeyPatch, name: str, sampling: Sampling, length: int
) -> None:
    """Guards against a distribution from before top-k or of another node, a cache of another branch, and a token drawn
    with randomness that the draft has used.
    """
    drafter = drafters()[name]
    distribution = decoded_distribution(monkeypatch, Early(drafter) if length < 4 else drafter, sampling, length)
    assert sum(distribution.values()) == pytest.approx(1.0, abs=1e-9)
    assert distance(distribution, target_distribution(sampling, length)) < 1e-9


@pytest.mark.parametrize("name", sorted(drafters().keys() - {"none"}))
def test_every_drafter_drafts_behind_the_prompt(name: str) -> None:
    """Guards against a case above that proves nothing, since its drafter proposes nothing."""
    sampling = Sampling(0.8, seed=1)
    target, drafter = enumerated_model(0, layers=2), drafters()[name]
    result = generate(target, PROMPT, drafter=Early(drafter), sampling=sampling, max_new_tokens=4)
    assert sum(step.drafted for step in result.steps) > 0


@pytest.mark.parametrize("name", ["lookup", "chain", "static-tree"])
@pytest.mark.parametrize(
    "controller",
    [functools.partial(AdaptiveK, most=2), lambda: Moody([Limit(1), Limit(0), Limit(2)])],
    ids=["adaptive", "by turns"],
)
def test_the_distribution_does_not_depend_on_how_long_was_drafted(
    monkeypatch: pytest.MonkeyPatch, name: str, controller: Callable[[], Controller]
) -> None:
    """Guards against a draft length that depends on the coming draw, and a draft that misses a token."""
    sampling = Sampling(0.8, top_k=2)
    distribution = decoded_distribution(monkeypatch, drafters()[name], sampling, 4, controller=controller)
    assert distance(distribution, target_distribution(sampling, 4)) < 1e-9


@functools.cache
def plain_distribution(policy: CachePolicy, sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """Return the distribution of autoregressive decoding with a policy."""
    with pytest.MonkeyPatch.context() as patch:
        return decoded_distribution(patch, NoDraft(), sampling, length, policy)


@pytest.mark.parametrize("policy", [SinkWindow(7, sinks=1, trigger=0.6), HeavyHitter(6, recent=1, interval=2)])
@pytest.mark.parametrize("name", ["lookup", "chain", "static-tree", "best-first-tree"])
def test_with_a_policy_the_distribution_is_that_of_plain_sampling_with_it(
    monkeypatch: pytest.MonkeyPatch, name: str, policy: CachePolicy
) -> None:
    """Guards against an eviction that depends on random acceptances."""
    sampling = Sampling(0.8, top_k=2)
    plain = plain_distribution(policy, sampling, 4)
    assert distance(plain, target_distribution(sampling, 4)) > 1e-3
    assert distance(decoded_distribution(monkeypatch, drafters()[name], sampling, 4, policy), plain) < 1e-9


@dataclass
class WrongDistribution:
    """A drafter that passes on another distribution than the one it drew from: at temperature 1, before top-k."""

    inner: ModelDrafter
    layers: tuple[int, ...] = ()

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tree = self.inner.propose(context, limit)
        fresh = ModelDrafter(self.inner.draft, self.inner.shape)
        whole = fresh.propose(replace(context, sampling=Sampling(1.0), rng=BranchRng([])), limit)
        return DraftTree(tree.tokens, tree.parents, whole.probs[:1].expand(len(tree), -1))


@pytest.mark.parametrize("sampling", [Sampling(0.8, top_k=3), Sampling(0.5)], ids=str)
def test_another_distribution_than_the_one_drawn_from_is_found_out(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """Guards against an enumeration that any drafter passes."""
    distribution = decoded_distribution(
        monkeypatch, Early(WrongDistribution(ModelDrafter(enumerated_model(1)))), sampling, 2
    )
    assert sum(distribution.values()) == pytest.approx(1.0, abs=1e-9)
    assert distance(distribution, target_distribution(sampling, 2)) > 1e-3


def test_a_seed_fixes_the_text() -> None:
    """Guards against randomness from outside the generation's own generator."""

    def text(seed: int) -> list[int]:
        drafter = ModelDrafter(enumerated_model(1), StaticTree((2, 1)))
        return generate(
            enumerated_model(0), PROMPT, drafter=drafter, sampling=Sampling(1.0, seed=seed), max_new_tokens=24
        ).tokens

    assert text(5) == text(5)
    assert text(5) != text(6)
