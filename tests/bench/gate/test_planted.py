"""Planted slowdowns and faults: the gate must catch each, and blame the right part.

Time is a fake clock's. Every forward of the models moves it, whoever calls it: 10 ms for the target's, 1 ms for the
draft's, a little for each token, and a little for each step. Only the last test takes real time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdecode import LM, DraftTree, ModelDrafter, PromptLookup
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.run import Run
from specdecode.bench.gate.blame import PARTS, Blame, blame
from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict, judge
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.runs.counts import RowCounts, RowSeconds, Seconds, as_dict
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile
from specdecode.controllers.base import FixedK, Limit
from specdecode.core.slots import Slots
from specdecode.core.verify import Acceptance
from specdecode.decoding import sequence
from specdecode.drafters import base as drafters
from specdecode.drafters import model as model_drafter
from tests.helpers.fake_clock import Cost, FakeClock, RealClock, charged
from tests.helpers.lean import lean
from tests.helpers.models import prompt, small

ARMS: dict[str, dict[str, Any]] = {
    "ar": {},
    "hf-generate": {"peer": "generate"},
    "linear": {"drafter": "model", "k": 4},
    "tree": {"drafter": "model", "k": 3, "shape": "static", "branching": [2, 2, 1]},
    "lookup": {"drafter": "lookup", "k": 4},
}
PROMPTS = {f"text/{length}": list(prompt(length)) for length in range(6, 15)}
TOKENS = 24
IDENTITY = Identity("abacus-2-threads", "t", "d", "float64", "planted")
LOOP = 0.0005

Judged = dict[tuple[str, str], Judgement]


@dataclass(frozen=True, slots=True)
class Plot:
    """The means to plant a fault: the patcher, the clock, and the seconds of a step of each arm without the fault."""

    patch: pytest.MonkeyPatch
    clock: FakeClock | RealClock
    step: dict[str, float]

    def before(self, owner: Any, name: str, action: Callable[..., Any]) -> None:
        """Run a further action before each call of a function or method."""
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            action(*args, **kwargs)
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, replaced)

    def after(self, owner: Any, name: str, change: Callable[..., Any]) -> None:
        """Change the result of a function or method, given the first argument and the right result."""
        original = getattr(owner, name)
        self.patch.setattr(owner, name, lambda *args, **kwargs: change(args[0], original(*args, **kwargs)))


Plant = Callable[[Plot], None]


@functools.cache
def target() -> LM:
    return lean(small(seed=5, hidden_size=16, intermediate_size=16))


@functools.cache
def draft() -> LM:
    """Return the target with a little noise on its weights: often right, and often wrong."""
    model = copy.deepcopy(target().model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.012 * torch.randn(weights.shape, generator=generator).to(weights)
    return LM(model)


def nothing(plot: Plot) -> None:
    pass


@functools.cache
def measured(plant: Plant, seed: int = 0) -> Results:
    """Run an experiment on the fake clock, with a fault planted first."""
    clock = FakeClock(seed)
    step = {} if plant is nothing else steps_of(run_of(measured(nothing)))
    costs = {target().model: Cost(0.010, 0.0005), draft().model: Cost(0.001, 0.0001)}
    with pytest.MonkeyPatch.context() as patch, charged(clock, costs):
        patch.setattr(time, "perf_counter", clock)
        patch.setattr(gc, "collect", lambda: 0)  # it costs this clock nothing
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # takes half of the time; others check
        plot = Plot(patch, clock, step)
        plot.before(FixedK, "observe", lambda *_: clock.advance(LOOP))
        plant(plot)
        return experimented(*ARMS)


def experimented(*names: str) -> Results:
    arms = [make_arm(name, ARMS[name], target(), draft()) for name in names]
    return experiment(arms, PROMPTS, TOKENS)


def run_of(results: Results) -> RunFile:
    """Return the results as a gate reads them."""
    header = Header(IDENTITY, TOKENS, results.outputs(), results.floor)
    return RunFile(Path("run"), header, results.records())


def steps_of(run: RunFile) -> dict[str, float]:
    """Return the seconds of a step, by arm."""
    return {name: arm.seconds().total / arm.counts().steps for name, arm in run.arms.items()}


def judged(new: RunFile, old: RunFile) -> Judged:
    return {(judgement.arm, judgement.gate): judgement for judgement in judge(new, old)}


def failing(judgements: Judged) -> set[str]:
    """Return the verdicts that fail the gate."""
    return {f"{arm} {gate}" for (arm, gate), found in judgements.items() if found.verdict in FAILING["on"]}


def main_blame(judgement: Judgement) -> str:
    assert judgement.blame is not None
    return judgement.blame.main


@pytest.fixture(scope="module")
def sound() -> Results:
    """Return the results without a fault."""
    return measured(nothing)


@pytest.fixture(scope="module")
def old(sound: Results) -> RunFile:
    return run_of(sound)


@pytest.fixture(scope="module")
def slow() -> Results:
    """Return the results with a fault in drafting."""
    return measured(slow_draft, seed=1)


# Faults.


def slowed(arm: str, owner: Any, name: str, share: float = 0.1) -> Plant:
    """Make a call take longer, by a share of the arm's step."""
    return lambda plot: plot.before(owner, name, lambda *_, **__: plot.clock.advance(share * plot.step[arm]))


slow_draft = slowed("linear", ModelDrafter, "propose")


def slow_trees(plot: Plot) -> None:
    """Slow only the target's forwards over proposals."""

    def wait(lm: LM, slots: Slots, pending: list[int], tree: DraftTree, **_: Any) -> None:
        plot.clock.advance(0.15 * plot.step["tree"] * bool(len(tree)))

    plot.before(LM, "forward_tree", wait)


def every_target_forward_twice(plot: Plot) -> None:
    """Run each forward a second time for nothing, hidden from all code that counts forwards."""

    def once(lm: LM, slots: Slots, tokens: torch.Tensor, **_: Any) -> None:
        if lm is target():
            count = len(tokens)
            mask = torch.zeros(1, 1, count, count, dtype=lm.dtype, device=lm.device)
            lm.model(input_ids=tokens[None].to(lm.device), attention_mask=mask, use_cache=False)

    plot.before(LM, "forward", once)


def busy_machine(plot: Plot) -> None:
    assert isinstance(plot.clock, FakeClock)
    plot.clock.pace = 1.5


def machine_that_gets_warm(plot: Plot) -> None:
    assert isinstance(plot.clock, FakeClock)
    plot.clock.drift = 0.03


def slow_draft_on_a_busy_machine(plot: Plot) -> None:
    busy_machine(plot)
    slow_draft(plot)


def draft_cache_forgotten(plot: Plot) -> None:
    """Let the draft read the whole text again in every step, in one forward as before."""
    plot.patch.setattr(model_drafter, "common_prefix", lambda *_: 0)


def k_halved(plot: Plot) -> None:
    plot.patch.setattr(FixedK, "limit", lambda controller: Limit(controller.k // 2, controller.nodes))


def last_proposal_dropped(plot: Plot) -> None:
    plot.after(ModelDrafter, "propose", lambda _, tree: tree.clip(max(tree.depth - 1, 0)))


def bonus_token_dropped(plot: Plot) -> None:
    """Drop the target's token after accepted ones. All committed tokens stay right."""

    def change(tree: DraftTree, verdict: Acceptance) -> Acceptance:
        return Acceptance(verdict.path[:-1], verdict.tokens[:-1]) if verdict.path else verdict

    plot.after(sequence, "accept", change)


def lookup_finds_nothing(plot: Plot) -> None:
    plot.patch.setattr(PromptLookup, "propose", lambda *_: DraftTree.empty())


def one_more_host_read(plot: Plot) -> None:
    plot.before(FixedK, "observe", lambda *_: torch.zeros(1, device=target().device).item())


def cache_copied(plot: Plot) -> None:
    def renew(slots: Slots, *_: Any, **__: Any) -> None:
        # Two copies: one is smaller than the logits of a lookup, which are freed by now, and would not raise the peak.
        _, (keys, values) = [copy.deepcopy((slots._keys, slots._values)) for _ in range(2)]
        slots._keys.update(keys)
        slots._values.update(values)

    plot.before(Slots, "keep", renew)


def cache_copied_slowly(plot: Plot) -> None:
    cache_copied(plot)
    slowed("ar", Slots, "keep")(plot)


def slots_never_used(plot: Plot) -> None:
    plot.patch.setattr(drafters, "MAX_DRAFT_NODES", 512)


def first_proposal_believed(plot: Plot) -> None:
    """Accept a proposal that the target would not have made, wherever none was accepted."""

    def change(tree: DraftTree, verdict: Acceptance) -> Acceptance:
        return verdict if verdict.path or not len(tree) else Acceptance([1], [int(tree.tokens[0]), *verdict.tokens])

    plot.after(sequence, "accept", change)


def target_wrong_everywhere(plot: Plot) -> None:
    """Take the least likely token for the most likely, with and without proposals, in target and draft."""
    plot.after(LM, "_forward", lambda _, logits: [-rows for rows in logits])


def faster_transformers(plot: Plot) -> None:
    assert isinstance(plot.clock, FakeClock)
    clock, generate = plot.clock, target().model.generate

    def sooner(*args: Any, **kwargs: Any) -> Any:
        clock.pace = 0.8
        try:
            return generate(*args, **kwargs)
        finally:
            clock.pace = 1.0

    plot.patch.setattr(target().model, "generate", sooner)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, all verdicts that must fail because of it, and the part to blame for the time of each arm."""

    plant: Plant
    fails: set[str]
    blamed: dict[str, str] = dataclasses.field(default_factory=dict)


def times(*arms: str) -> set[str]:
    return {f"{arm} time" for arm in arms}


def counters(*arms: str) -> set[str]:
    return {f"{arm} counters" for arm in arms}


OURS = ("ar", "linear", "tree", "lookup")
DRAFTING = ("linear", "tree")
FAULTS = {
    "a slow draft": Fault(
        slow_draft,
        times(*DRAFTING),
        {arm: "drafting" for arm in DRAFTING},
    ),
    "a slow draft on a busy machine": Fault(
        slow_draft_on_a_busy_machine,
        times(*DRAFTING),
        {arm: "drafting" for arm in DRAFTING},
    ),
    "a draft without its cache": Fault(
        draft_cache_forgotten,
        times(*DRAFTING) | counters(*DRAFTING),
        {arm: "drafting" for arm in DRAFTING},
    ),
    "a slow verification": Fault(slowed("ar", LM, "forward_tree"), times("ar"), {"ar": "verifying"}),
    "a slow verification of trees": Fault(
        slow_trees, times("linear", "tree", "lookup"), {arm: "verifying" for arm in ("linear", "tree", "lookup")}
    ),
    "every target forward twice": Fault(every_target_forward_twice, times("ar") | counters(*OURS), {"ar": "verifying"}),
    "a slow loop": Fault(slowed("ar", FixedK, "observe"), times("ar"), {"ar": "overhead"}),
    "K halved": Fault(
        k_halved,
        times(*DRAFTING) | counters("linear", "tree", "lookup"),
        {arm: "acceptance length" for arm in ("linear", "tree", "lookup")},
    ),
    "the last proposal dropped": Fault(
        last_proposal_dropped,
        times(*DRAFTING) | counters(*DRAFTING),
        {arm: "acceptance length" for arm in DRAFTING},
    ),
    "the bonus token dropped": Fault(
        bonus_token_dropped,
        times("linear", "tree", "lookup") | counters("linear", "tree", "lookup"),
        {arm: "acceptance length" for arm in ("linear", "tree", "lookup")},
    ),
    "a lookup that finds nothing": Fault(
        lookup_finds_nothing, times("lookup") | counters("lookup"), {"lookup": "acceptance length"}
    ),
    "one more host read in a step": Fault(one_more_host_read, counters(*OURS)),
    "the cache copied in every step": Fault(cache_copied, counters(*OURS)),
    "the cache copied slowly": Fault(cache_copied_slowly, times("ar") | counters(*OURS), {"ar": "overhead"}),
    "slots that are never used": Fault(slots_never_used, counters(*OURS)),
    "a wrong acceptance": Fault(
        first_proposal_believed, times("linear", "tree", "lookup") | counters("linear", "tree", "lookup")
    ),
    "a target that is wrong everywhere": Fault(target_wrong_everywhere, times("hf-generate") | counters("hf-generate")),
    "a faster transformers": Fault(faster_transformers, times("ar")),
}


def test_the_draft_is_right_and_wrong(old: RunFile) -> None:
    """Guards against planted faults that prove nothing: the draft must be accepted in some steps and rejected in
    others.
    """
    for arm in DRAFTING:
        accepted = old.arms[arm].histograms().accepted
        assert accepted[0] > 0
        assert accepted[-1] > 0
    assert 0 < old.header.floor < 0.01
    assert not failing(judged(old, old))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught_and_blamed(fault: Fault, old: RunFile) -> None:
    """Guards against a gate that misses a fault, fails arms without the fault, or blames another part.

    Which verdict catches a fault, where it is not plain:

    - A fault that slows `ar` and the arms over it alike shows in `ar` alone, which is judged over transformers.
    - A hidden target forward shows in the times of `ar` only: `ar` pays twice for every token, so the drafting arms
      look better over it than before. The counters show it in all arms, as they count forwards whoever calls them.
    - A lookup with half the K is not certain to be slower, because its forwards are narrower. Its counters show it.
    - A target that is wrong in the same way with and without proposals differs only from transformers' output.
    - A faster transformers looks like a slower `ar`, because nothing else measures `ar`. The arms over `ar` still pass.
    """
    judgements = judged(run_of(measured(fault.plant, seed=1)), old)
    assert failing(judgements) == fault.fails, [j.reason for j in judgements.values() if j.verdict is not Verdict.PASS]
    assert {arm: main_blame(judgements[arm, "time"]) for arm in fault.blamed} == fault.blamed
    assert all(
        judgements[arm, "time"].reason.endswith(f"mostly {part}")
        for arm, part in fault.blamed.items()
        if judgements[arm, "time"].verdict in (Verdict.REGRESSED, Verdict.IMPROVED)
    )


@pytest.mark.parametrize(
    "plant",
    [
        nothing,
        busy_machine,
        machine_that_gets_warm,
        slowed("linear", ModelDrafter, "propose", share=0.02),
        slowed("ar", FixedK, "observe", share=0.02),
    ],
    ids=["nothing", "a busy machine", "a machine that gets warm", "2 % in drafting", "2 % in the loop"],
)
def test_where_nothing_is_wrong_everything_passes(plant: Plant, old: RunFile) -> None:
    """Guards against false alarms: at noise, at the machine's speed, or within the tolerance."""
    judgements = judged(run_of(measured(plant, seed=2)), old)
    assert {judgement.verdict for judgement in judgements.values()} == {Verdict.PASS}


def test_a_faster_draft_is_told(old: RunFile) -> None:
    """Guards against a wrong sign: an improvement must neither fail the gate nor stay unreported."""
    judgements = judged(run_of(measured(slowed("linear", ModelDrafter, "propose", share=-0.1), seed=1)), old)
    improved = {key for key, judgement in judgements.items() if judgement.verdict is Verdict.IMPROVED}
    assert improved == {(arm, "time") for arm in DRAFTING}
    assert {main_blame(judgements[arm, "time"]) for arm in DRAFTING} == {"drafting"}
    assert not failing(judgements)


def jittered(results: Results, seed: int, scatter: float) -> RunFile:
    """Return the same runs on a noisier machine: each time is multiplied by a random factor."""
    noise = random.Random(seed)

    def again(run: Run) -> Run:
        factor = math.exp(noise.gauss(0, scatter))
        seconds = Seconds(**{part: value * factor for part, value in as_dict(run.seconds).items()})
        return dataclasses.replace(run, total_s=run.total_s * factor, ttft_s=run.ttft_s * factor, seconds=seconds)

    blocks = [
        dataclasses.replace(
            block,
            runs={arm: again(run) for arm, run in block.runs.items()},
            last={arm: again(run) for arm, run in block.last.items()},
        )
        for block in results.blocks
    ]
    return run_of(Results(results.arms, blocks, results.counters_runs))


@pytest.mark.parametrize("scatter", [0.005, 0.02, 0.05])
def test_noise_neither_convicts_nor_acquits(sound: Results, slow: Results, scatter: float) -> None:
    """Guards against a verdict by luck: noise may make a fault inconclusive, but never a pass, nor a sound run a
    regression.
    """
    for seed in range(20):
        before = jittered(sound, 2 * seed, scatter)
        assert not failing(judged(jittered(sound, 2 * seed + 1, scatter), before))
        verdict = judged(jittered(slow, 2 * seed + 1, scatter), before)["linear", "time"].verdict
        assert verdict in ({Verdict.REGRESSED} if scatter < 0.01 else {Verdict.REGRESSED, Verdict.INCONCLUSIVE})


@pytest.mark.parametrize("new_name", [None, "linear-k4"], ids=["removed", "renamed"])
def test_a_slow_arm_does_not_get_away_under_another_name(new_name: str | None, old: RunFile, slow: Results) -> None:
    """Guards against a regression that passes because its arm is removed from the run, or renamed."""
    new = run_of(slow)
    arms = {new_name if name == "linear" else name: arm for name, arm in new.arms.items()}
    judgements = judged(dataclasses.replace(new, arms={name: arm for name, arm in arms.items() if name}), old)
    assert {judgements["linear", gate].verdict for gate in ("time", "counters")} == {Verdict.MISSING}
    if new_name:
        assert {judgements[new_name, gate].verdict for gate in ("time", "counters")} == {Verdict.NO_BASELINE}
    assert failing(judgements) == {"linear time", "linear counters", "tree time"}


def test_a_wrong_output_voids_what_is_right_too(old: RunFile) -> None:
    """Guards against a wrong arm that is judged by the prompts on which it happened to be right."""
    results = measured(first_proposal_believed, seed=1)
    judgements = judged(run_of(results), old)
    assert 0 < len(results.wrong("tree")) < len(PROMPTS)
    assert len(results.wrong("lookup")) == len(PROMPTS)
    for arm in ("tree", "lookup"):
        assert f"{len(results.wrong(arm))} wrong output" in judgements[arm, "time"].reason
        assert judgements[arm, "time"].change is None


def test_judging_changes_nothing(old: RunFile, slow: Results) -> None:
    """Guards against slow code that passes the second time, as in pytest-benchmark, which saves a run before it
    compares.
    """
    new = run_of(slow)
    files = copy.deepcopy((new, old))
    first = judge(new, old)
    assert failing(judged(new, old)) == {"linear time", "tree time"}
    assert judge(new, old) == first
    assert (new, old) == files


def faster_ar(plot: Plot) -> None:
    """Make decoding without proposals faster, and nothing else."""

    def gain(lm: LM, slots: Slots, pending: list[int], tree: DraftTree, **_: Any) -> None:
        plot.clock.advance(-0.2 * plot.step["ar"] * (not len(tree)))

    plot.before(LM, "forward_tree", gain)


def test_a_faster_ar_is_no_slower_transformers(old: RunFile) -> None:
    """Guards against a gate that fails for transformers' time, which this package cannot change."""
    judgements = judged(run_of(measured(faster_ar, seed=1)), old)
    assert judgements["ar", "time"].verdict is Verdict.IMPROVED
    assert not {"hf-generate time", "hf-generate counters"} & failing(judgements)


@pytest.mark.parametrize("plant", [faster_ar, every_target_forward_twice], ids=["faster", "slower"])
def test_no_part_of_an_arm_is_blamed_for_what_it_is_compared_with(plant: Plant, old: RunFile) -> None:
    """Guards against a draft that is credited or blamed because its reference arm `ar` became faster or slower."""
    found = judged(run_of(measured(plant, seed=1)), old)["linear", "time"].blame
    assert found is not None
    assert found.shares["drafting"] == pytest.approx(0, abs=0.01)
    assert found.main not in PARTS


def test_setting_up_is_overhead(old: RunFile) -> None:
    """Guards against blaming forwards for the slow allocation of slots."""
    judgements = judged(run_of(measured(slowed("ar", LM, "new_slots", share=3.0), seed=1)), old)
    assert "ar time" in failing(judgements)
    assert main_blame(judgements["ar", "time"]) == "overhead"


def record(parts: tuple[float, ...], steps: int = 10, tokens: int = 20) -> ArmRecord:
    """Return an arm with these seconds of drafting, verifying and overhead."""
    draft, verify, overhead = parts
    seconds = RowSeconds(total=sum(parts), ttft=sum(parts) / 2, draft=draft, verify=verify, overhead=overhead)
    return ArmRecord({"text": Row(0.0, RowCounts(runs=1, tokens=tokens, steps=steps), seconds)})


def blamed(new: ArmRecord, old: ArmRecord, change: float | None = None, reference: float = 0.0) -> Blame:
    found = blame(new, old, ["text"], change, reference)
    assert found is not None
    return found


# Whole numbers: with parts that differ by less than a millionth, rounding would decide the split.
parts = st.tuples(*[st.integers(0, 1000).map(float)] * 3).filter(lambda of: sum(of) > 0)
measured_arms = st.tuples(parts, st.integers(1, 64), st.integers(64, 256))
factors = st.floats(1e-3, 1e3)


@given(new=measured_arms, old=measured_arms, change=factors, reference=st.floats(-1, 1))
def test_shares_of_the_blame_make_up_the_whole_change(new: Any, old: Any, change: float, reference: float) -> None:
    """Guards against a part of the change that nothing is blamed for, also where a part is zero before or after."""
    per_token = [sum(parts) / tokens for parts, _, tokens in (new, old)]
    own = blamed(record(*new), record(*old)).shares
    assert sum(own.values()) == pytest.approx(math.log(per_token[0] / per_token[1]), abs=1e-8)
    paired = blamed(record(*new), record(*old), change, reference).shares
    assert sum(paired.values()) == pytest.approx(-math.log(change), abs=1e-8)


def test_the_blame_is_for_the_change_that_was_judged(sound: Results, slow: Results) -> None:
    """Guards against a verdict of 0.95 with "time per token +0.9 %": disturbed runs decide sums, not the verdict."""
    for seed in range(5):
        judgements = judged(jittered(slow, 2 * seed + 1, 0.3), jittered(sound, 2 * seed, 0.3))
        found = {arm: judgement for (arm, _), judgement in judgements.items() if judgement.blame}
        assert found.keys() == set(OURS)
        for judgement in found.values():
            assert judgement.change is not None
            assert judgement.blame is not None
            assert sum(judgement.blame.shares.values()) == pytest.approx(-math.log(judgement.change.value), abs=1e-8)


@given(new=measured_arms, old=measured_arms, factor=factors)
def test_the_blame_is_the_same_in_any_unit(new: Any, old: Any, factor: float) -> None:
    """Guards against blame that depends on the speed of the machine or on the unit of time."""
    after, before = record(*new), record(*old)
    slower, slower_before = (record(tuple(factor * of for of in parts), *counts) for parts, *counts in (new, old))
    shares = pytest.approx(blamed(after, before).shares, abs=1e-8)
    assert blamed(slower, slower_before).shares == shares
    paired = pytest.approx(blamed(after, before, change=0.9).shares, abs=1e-8)
    assert blamed(slower, before, change=0.9).shares == paired


@given(new=measured_arms, old=measured_arms)
def test_the_way_back_has_the_opposite_blame(new: Any, old: Any) -> None:
    """Guards against blame that depends on which of two runs is called the old one."""
    forth, back = blamed(record(*new), record(*old)).shares, blamed(record(*old), record(*new)).shares
    assert {cause: -share for cause, share in back.items()} == pytest.approx(forth, abs=1e-8)


@pytest.mark.parametrize(
    ("after", "cause"),
    [
        (record((1, 5, 1)), "drafting"),
        (record((0, 6, 1)), "verifying"),
        (record((0, 5, 2)), "overhead"),
        (record((0, 10, 2), steps=20), "acceptance length"),
        (record((0.5, 9, 1)), "verifying"),
        (record((2, 4, 1)), "drafting"),
    ],
    ids=["from nought", "verifying", "overhead", "twice the steps", "the larger of two", "more than the gain"],
)
def test_the_part_that_moved_is_blamed(after: ArmRecord, cause: str) -> None:
    """Guards against a division by zero for a part that took no time before, and against blaming slow forwards for more
    steps.
    """
    found = blamed(after, record((0, 5, 1)))
    assert found.main == cause
    others = set(found.shares) - {cause}
    if cause == "acceptance length":
        assert [found.shares[other] for other in others] == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("arm", "owner", "name", "part"),
    [
        ("linear", ModelDrafter, "propose", "drafting"),
        ("ar", LM, "forward_tree", "verifying"),
        ("ar", FixedK, "observe", "overhead"),
    ],
    ids=["drafting", "verifying", "overhead"],
)
@pytest.mark.usefixtures("unchecked")
def test_a_planted_slowdown_is_caught_in_real_time(
    arm: str, owner: type, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a gate that works only on a fake clock. A delay of five steps is certain even on a busy
    machine.
    """

    def run() -> RunFile:
        return run_of(experimented("ar", "hf-generate" if arm == "ar" else arm))

    sound = run()
    slowed(arm, owner, name, share=5.0)(Plot(monkeypatch, RealClock(), steps_of(sound)))
    judgement = judged(run(), sound)[arm, "time"]
    assert judgement.verdict is Verdict.REGRESSED, judgement.reason
    assert main_blame(judgement) == part
