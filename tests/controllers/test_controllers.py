"""The draft length: first on simulated machines, against every fixed K, then in real decoding."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specdecode import (
    LM,
    AdaptiveK,
    Cascade,
    Chain,
    CostAware,
    Costs,
    DraftTree,
    FixedK,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    StaticTree,
    Step,
    generate,
    measure_costs,
)
from specdecode.backends.graph import CudaGraphs
from specdecode.controllers.base import Controller, Limit
from specdecode.controllers.cost_aware import DraftCost
from specdecode.decoding.measure_costs import _medians
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.tree_shapes import TreeShape
from tests.helpers.discovery import CONTROLLERS
from tests.helpers.fake_clock import Cost, FakeClock, charged
from tests.helpers.machines import AcceptanceModel, Machine, Plain, decode
from tests.helpers.models import ARCHITECTURES, build, prompt, small

pytestmark = pytest.mark.usefixtures("unchecked")

SEEDS = range(8)
KS = (1, 2, 3, 4, 6, 8, 12, 16)
MACHINES = {
    "GPU": Machine(row=0.005, draft=0.05, reading=0.0005),
    "GPU, dear draft": Machine(row=0.005, draft=0.25, reading=0.001),
    "GPU, queued draft": Machine(row=0.01, draft=0.15, reading=0.001, queued=True),
    "GPU, lookup": Machine(row=0.005, draft=0.0, asking=0.002),
    "CPU": Machine(row=0.15, draft=0.05, reading=0.004),
    "CPU, dear draft": Machine(row=0.15, draft=0.3, reading=0.02),
    "CPU, lookup": Machine(row=0.15, draft=0.0, asking=0.002),
}
TREES = {
    "GPU, tree": Machine(row=0.004, draft=0.05, reading=0.0005, tree=True),
    "GPU, dear tree": Machine(row=0.01, draft=0.2, reading=0.0005, tree=True),
    "CPU, tree": Machine(row=0.1, draft=0.05, reading=0.002, tree=True),
}


@functools.cache
def always(rate: float) -> AcceptanceModel:
    return lambda place, depth, nodes: rate


@functools.cache
def wider(rate: float) -> AcceptanceModel:
    """Return a tree's acceptance: the more nodes at a depth, the rarer that none of them is right."""
    return lambda place, depth, nodes: 1 - (1 - rate) * nodes**-0.5 if rate else 0.0


@functools.cache
def in_turns(period: int) -> AcceptanceModel:
    """Return a draft that is alternately as good as the target and useless."""
    return lambda place, depth, nodes: 0.95 * (place // period % 2)


def from_then_on(place: int, before: float, after: float) -> AcceptanceModel:
    return lambda at, depth, nodes: before if at < place else after


def seconds(machine: Machine, make: Callable[[], Controller], *args: object, **kwargs: object) -> list[float]:
    return [decode(machine, make(), *args, seed=seed, **kwargs).seconds for seed in SEEDS]


@functools.cache
def plain(machine: Machine, tokens: int) -> list[float]:
    return seconds(machine, Plain, always(0.0), tokens)


@functools.cache
def best(machine: Machine, acceptance: AcceptanceModel, tokens: int, proposes: float = 1.0) -> list[float]:
    """Return the seconds of the best fixed K and number of nodes, or of plain decoding if that is faster."""
    limits = [Limit(k, nodes) for k in KS for nodes in ((4, 12, 32, 64) if machine.tree else (64,))]
    fixed = [
        seconds(machine, functools.partial(FixedK, limit.depth, limit.nodes), acceptance, tokens, proposes=proposes)
        for limit in limits
    ]
    return min([plain(machine, tokens), *fixed], key=sum)


def over(others: list[float], own: list[float]) -> list[float]:
    """Return the speedups, seed by seed."""
    return [other / mine for other, mine in zip(others, own, strict=True)]


def over_best(
    machine: Machine, costs: Costs, acceptance: AcceptanceModel, tokens: int, proposes: float = 1.0
) -> list[float]:
    own = seconds(machine, lambda: CostAware(costs), acceptance, tokens, proposes=proposes)
    return over(best(machine, acceptance, tokens, proposes), own)


# By acceptance alone.


def steps(accepted: int, depth: int, count: int, emitted: int | None = None) -> list[Step]:
    emitted = accepted + 1 if emitted is None else emitted
    return [Step(depth, depth, depth + 1, accepted, emitted, depth, 0.1, 1.0, 1.2)] * count


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.8, 0.9, 0.97])
def test_an_adaptive_k_is_where_a_draft_holds_with_probability_one_half(rate: float) -> None:
    """Guards against a wrong K because the estimate counts tokens without a verdict, behind the first rejection or the
    draft's end.
    """
    expected = min(max(math.floor(math.log(0.5) / math.log(rate)), 1), 16)
    runs = [decode(MACHINES["GPU"], AdaptiveK(), always(rate), 1000, seed) for seed in SEEDS]
    settled = [limit.depth for run in runs for limit in run.limits[len(run.limits) // 4 :]]
    assert statistics.fmean(settled) == pytest.approx(expected, rel=0.15, abs=0.4)
    assert {limit.nodes for limit in runs[0].limits} == {64}


def test_an_adaptive_k_follows_a_change() -> None:
    """Guards against a K that stays fixed because old tokens of a text count for ever."""
    for before, after, low, high in ((0.95, 0.2, 1, 2), (0.2, 0.95, 8, 16)):
        runs = [decode(MACHINES["GPU"], AdaptiveK(), from_then_on(1000, before, after), 1400, seed) for seed in SEEDS]
        assert low <= statistics.median(run.limits[-1].depth for run in runs) <= high


def test_an_adaptive_k_stays_within_its_bounds() -> None:
    """Guards against a K that falls to 0, which would end drafting for ever, and against one that grows without
    bound.
    """
    controller = AdaptiveK(most=9, nodes=12)
    assert controller.limit() == Limit(5, 12)
    for step in steps(0, 5, 20_000):
        controller.observe(step)
    assert controller.limit() == Limit(1, 12)
    for step in steps(9, 9, 20_000):
        controller.observe(step)
    assert controller.limit() == Limit(9, 12)


def test_an_end_of_the_text_is_no_rejection() -> None:
    """Guards against shorter drafts because a text ended, or because nothing was proposed."""
    for step in (*steps(2, 8, 1, emitted=2), *steps(0, 0, 1)):
        controller = AdaptiveK()
        for _ in range(50):
            controller.observe(step)
        assert controller.limit().depth >= 5


# By costs.


@pytest.mark.parametrize("rate", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("name", MACHINES)
def test_what_pays_is_found(name: str, rate: float) -> None:
    """Guards against a controller that is slower than the best fixed K: by a wrong estimate, by trying too long, by
    missing costs, or by giving up speculation wrongly.
    """
    speeds = over_best(MACHINES[name], MACHINES[name].costs(), always(rate), 512)
    assert statistics.fmean(speeds) >= 0.95
    assert min(speeds) >= 0.75


@pytest.mark.parametrize("rate", [0.2, 0.6])
@pytest.mark.parametrize("name", TREES)
def test_a_tree_s_size_is_found(name: str, rate: float) -> None:
    """Guards against tree sizes that are never tried, or nodes that cost more than they gain. There are many sizes and
    depths, and only a long text shows the best.
    """
    speeds = over_best(TREES[name], TREES[name].costs(), wider(rate), 512)
    assert statistics.fmean(speeds) >= 0.9
    assert min(speeds) >= 0.75


@pytest.mark.parametrize("draft", [0.5, 2.0])
@pytest.mark.parametrize("name", ["GPU", "GPU, dear draft", "GPU, queued draft", "CPU", "CPU, lookup"])
def test_costs_that_are_wrong_at_the_start_are_corrected(name: str, draft: float) -> None:
    """Guards against a controller that never corrects costs measured in a busy moment, of drafting or of verifying.
    Where a draft is dear, only plain steps tell the two apart.
    """
    for rate in (0.0, 0.7):
        for costs in (MACHINES[name].costs(draft=draft), MACHINES[name].costs(verify=1 / draft)):
            speeds = over_best(MACHINES[name], costs, always(rate), 512)
            assert statistics.fmean(speeds) >= 0.95
    both = MACHINES[name].costs(draft, draft)
    assert statistics.fmean(over_best(MACHINES[name], both, always(0.7), 512)) >= 0.95


@pytest.mark.parametrize(
    "acceptance",
    [always(0.0), always(0.05), in_turns(8), in_turns(40)],
    ids=["never", "hardly ever", "in turns of 8", "in turns of 40"],
)
@pytest.mark.parametrize("name", [*MACHINES, *TREES])
def test_nothing_is_slower_than_plain_decoding(name: str, acceptance: AcceptanceModel) -> None:
    """Guards against a useless draft that slows decoding: by reading the prompt, by the first trial, by later trials,
    or by being useful just long enough to be trusted.
    """
    machine = (MACHINES | TREES)[name]
    for tokens in (128, 512):
        speeds = over(plain(machine, tokens), seconds(machine, lambda: CostAware(machine.costs()), acceptance, tokens))
        assert min(speeds) >= 0.97
    for costs in (machine.costs(draft=0.5), machine.costs(verify=2.0)):
        speeds = over(plain(machine, 128), seconds(machine, lambda costs=costs: CostAware(costs), acceptance, 128))
        assert min(speeds) >= 0.95


def test_a_machine_that_becomes_busy_changes_nothing() -> None:
    """Guards against drafting that looks slow because its times are compared with those of a quieter moment."""
    for name in ("GPU, dear draft", "CPU"):
        machine = MACHINES[name]
        for pace in (lambda now: 1.0 + now // 60 % 2, lambda now: 1.0 + now / 100):
            fixed = [seconds(machine, functools.partial(FixedK, k), always(0.8), 400, pace=pace) for k in KS]
            own = seconds(machine, functools.partial(CostAware, machine.costs()), always(0.8), 400, pace=pace)
            speeds = over(min(fixed, key=sum), own)
            assert statistics.fmean(speeds) >= 0.93
            assert min(speeds) >= 0.8


def test_one_slow_step_does_not_end_speculation() -> None:
    """Guards against a pause of the system taken for the cost of a draft."""
    machine = MACHINES["GPU, dear draft"]
    for seed in SEEDS:
        controller = CostAware(machine.costs())
        decode(machine, controller, always(0.8), 200, seed)
        before = controller.limit()
        assert before.depth > 0
        slow = steps(3, before.depth, 1)[0]
        controller.observe(replace(slow, draft_s=0.3, verify_s=30.0, total_s=30.3))
        assert controller.limit().depth > 0


@pytest.mark.parametrize("name", ["GPU", "GPU, dear draft", "GPU, lookup", "CPU", "CPU, lookup"])
def test_a_draft_that_becomes_useful_is_found_out(name: str) -> None:
    """Guards against speculation that is given up for good."""
    machine = MACHINES[name]
    runs = [decode(machine, CostAware(machine.costs()), from_then_on(300, 0.0, 0.85), 1500, seed) for seed in SEEDS]
    assert min(run.drafted(start=1200) for run in runs) > 20
    assert min(over(plain(machine, 1500), [run.seconds for run in runs])) > 1.05


@pytest.mark.parametrize("name", ["GPU", "GPU, dear draft", "CPU", "CPU, lookup"])
def test_a_trial_that_gained_is_no_failure(name: str) -> None:
    """Guards against failures that count for ever, and against a trial that gained and still counts as a failure
    because of its end. The next probe would be thousands of tokens away.
    """
    machine = replace(MACHINES[name], noise=0.0, reading=0.0)

    def useful_for_a_while(at: int, depth: int, nodes: float) -> float:
        return 0.95 * (400 <= at < 1200)

    for seed in SEEDS:
        run = decode(machine, CostAware(machine.costs()), useful_for_a_while, 2000, seed)
        assert run.drafted(400, 1200) > 30
        assert run.drafted(1250) >= 3


def test_a_draft_that_becomes_useless_costs_no_more_than_some_steps() -> None:
    """Guards against losing all earlier gains before a slow average shows that the draft has become useless."""
    for name in ("GPU, dear draft", "CPU, dear draft"):
        machine = MACHINES[name]
        for seed in SEEDS:
            good, all_ = (
                decode(machine, CostAware(machine.costs()), from_then_on(1000, 0.95, 0.0), tokens, seed).seconds
                for tokens in (1000, 1600)
            )
            assert all_ - good <= 1.01 * 600 + 14


def test_probes_become_rarer_and_cost_little() -> None:
    """Guards against probes at a constant rate, and against a probe's cost without the draft's reading. Where reading
    alone takes more than 1 % of the time, a text gets no further probe.
    """
    for reading in (0.0, 0.004, 0.02):
        machine = replace(MACHINES["GPU, dear draft"], reading=reading, noise=0.0)
        run = decode(machine, CostAware(machine.costs()), always(0.0), 4000, seed=0, prompt=1)
        probes = [run.drafted(start, end) for start, end in ((100, 1000), (1000, 2000), (2000, 4000))]
        later = decode(machine, CostAware(machine.costs()), always(0.0), 100, seed=0, prompt=1)
        assert later.seconds - 100 <= 2.0
        assert run.seconds - 4000 <= 2.0 + 0.01 * 4000
        assert probes == [0, 0, 0] if reading == 0.02 else probes[0] >= max(probes[1:]) and sum(probes) >= 2


@pytest.mark.parametrize("reading", [0.009, 0.05])
def test_a_probe_costs_what_reading_turns_out_to_cost(reading: float) -> None:
    """Guards against a cost of catching up that is measured once and never corrected."""
    machine = replace(MACHINES["GPU, dear draft"], reading=reading)
    unaware = replace(machine, reading=0.0).costs()
    for seed in SEEDS:
        run = decode(machine, CostAware(unaware), always(0.0), 4000, seed, prompt=1)
        assert run.seconds <= 1.02 * 4000


def test_a_probe_waits_for_what_a_prompt_takes_to_read() -> None:
    """Guards against a probe whose cost leaves out the reading of a new prompt."""
    machine = replace(MACHINES["GPU, dear draft"], reading=0.004, noise=0.0)
    controller = CostAware(machine.costs())
    decode(machine, controller, always(0.0), 100, seed=0, prompt=1)
    for seed in range(5):
        run = decode(machine, controller, always(0.0), 100, seed, prompt=2000)
        assert run.seconds <= 1.01 * 100


def test_a_prompt_does_not_tell_what_reading_costs() -> None:
    """Guards against the target's prefill counted as the draft's catching up, where a probe is a text's first step: no
    further probe would ever be made.
    """
    machine = replace(MACHINES["GPU, dear draft"], reading=0.0, noise=0.0)
    controller = CostAware(machine.costs())
    decode(machine, controller, always(0.0), 100, seed=0)
    for _ in range(200):
        if not controller.limit().depth:
            controller.observe(Step(0, 0, 1, 0, 1, 0, 0.0, 1.0, 1.0))
    run = decode(machine, controller, always(0.0), 400, seed=0, prompt=2000)
    assert run.steps[0].drafted
    assert run.drafted(start=1) >= 2


@pytest.mark.parametrize("reading", [0.1, 0.0])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_draft_that_could_not_pay_if_it_were_perfect_is_never_asked(rate: float, reading: float) -> None:
    """Guards against paying for a prompt's reading, a trial or probes where the costs alone rule the draft out. Also
    against counting the prefill step as a plain one, beside which any draft looks cheap.
    """
    machine = Machine(row=0.15, draft=0.95, reading=reading)
    controller = CostAware(machine.costs())
    for seed in range(5):
        run = decode(machine, controller, always(rate), 400, seed, prompt=2000)
        assert {limit.depth for limit in run.limits} == {0}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("proposes", [0.05, 0.4])
@pytest.mark.parametrize("name", ["GPU, lookup", "CPU, lookup"])
def test_rare_proposals_are_used(name: str, proposes: float, rate: float) -> None:
    """Guards against steps without a proposal counted as rejected drafts."""
    speeds = over_best(MACHINES[name], MACHINES[name].costs(), always(rate), 512, proposes)
    assert statistics.fmean(speeds) >= 0.95
    assert min(speeds) >= 0.85


def test_a_draft_that_an_eviction_cuts_short_is_no_rejection() -> None:
    """Guards against shorter drafts, because a policy evicts and every step before it ends there."""
    machine = MACHINES["CPU, lookup"]
    controllers = [CostAware(machine.costs()) for _ in range(2)]
    for controller in controllers:
        decode(machine, controller, always(0.8), 200, seed=1)
    before = controllers[0].limit()
    assert before.depth > 2
    verify_s = machine.costs().verify_s(3)
    for controller, allowed in zip(controllers, (2, sys.maxsize), strict=True):
        for _ in range(20):
            controller.observe(Step(2, 2, 3, 2, 3, 2, 0.002, verify_s, verify_s + 0.002, allowed=allowed))
    assert controllers[0].limit().depth >= before.depth
    assert controllers[1].limit().depth < before.depth


def test_empty_proposals_say_nothing_of_acceptance() -> None:
    """Guards against a lookup that is no longer used when a text begins to repeat itself."""
    machine = MACHINES["GPU, lookup"]
    controller = CostAware(machine.costs())
    decode(machine, controller, always(0.8), 200, seed=1)
    before = controller.limit()
    for _ in range(1000):
        controller.observe(Step(0, 0, 1, 0, 1, 0, 0.002, 1.0, 1.002))
    assert before.depth > 4
    assert controller.limit() == before


def test_asking_in_vain_is_paid_for() -> None:
    """Guards against a slow search that finds nothing and is kept, because no draft is ever rejected."""
    machine = replace(MACHINES["CPU, lookup"], asking=0.2)
    for seed in SEEDS:
        run = decode(machine, CostAware(machine.costs()), always(0.9), 1000, seed, proposes=0.0)
        assert run.seconds <= 1.02 * 1000


@pytest.mark.parametrize("depth", [1, 3])
def test_a_draft_that_ends_before_its_limit_is_not_believed_to_go_on(depth: int) -> None:
    """Guards against tokens expected at depths that the drafter never reaches, where nothing is rejected either."""
    machine = replace(MACHINES["CPU, dear draft"], depth=depth, reading=0.0, draft=0.4)
    speeds = over_best(machine, machine.costs(), always(0.6), 1024)
    assert statistics.fmean(speeds) >= 0.95
    own = seconds(machine, lambda: CostAware(machine.costs()), always(0.3), 1024)
    assert min(over(plain(machine, 1024), own)) >= 0.97


def test_the_prompt_s_step_is_not_taken_for_a_slow_one() -> None:
    """Guards against the prefill time charged to the first draft, or to plain decoding: in short texts it is most of
    the time.
    """
    machine = Machine(row=0.05, draft=0.4)
    shares = []
    for first in SEEDS:
        controller = CostAware(machine.costs())
        runs = [decode(machine, controller, always(0.8), 16, first + text, prompt=2000) for text in range(30)]
        shares.append(sum(run.seconds for run in runs) / (30 * 16))
    assert statistics.fmean(shares) <= 0.85


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_limit_may_be_asked_for_at_any_time(name: str) -> None:
    """Guards against a controller that changes when its limit is read, and against one that shares state with
    another.
    """
    controller, other = CONTROLLERS[name](), CONTROLLERS[name]()
    first = controller.limit()
    for step in (*steps(0, first.depth, 8), *steps(0, 0, 8)):
        assert controller.limit() == controller.limit()
        controller.observe(replace(step, draft_s=1e-4, verify_s=1e-3, total_s=1.1e-3))
    assert other.limit() == CONTROLLERS[name]().limit() == first


# Costs.


def test_costs_lie_on_lines_between_the_measured_ones() -> None:
    """Guards against costs that are not interpolated between measured sizes, and a negative cost beyond the
    last size.
    """
    costs = Costs({1: 1.0, 5: 2.0, 9: 1.0}, {Limit(1, 8): DraftCost(1, 0.5), Limit(4, 8): DraftCost(7, 2.0)})
    assert [costs.verify_s(rows) for rows in (1, 3, 5, 7, 9, 13, 20)] == [1.0, 1.5, 2.0, 1.5, 1.0, 0.0, 0.0]
    drafts = [DraftCost(1, 0.5), DraftCost(3, 1.0), DraftCost(5, 1.5), DraftCost(7, 2.0), DraftCost(9, 2.5)]
    assert costs.drafts(5) == {8: drafts}
    flat = Costs({1: 1.0}, {Limit(2): DraftCost(2, 0.1)})
    assert (flat.verify_s(64), flat.drafts(1)) == (1.0, {64: [DraftCost(2, 0.1)]})


DRAFTS = {Limit(1): DraftCost(1, 0.1)}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AdaptiveK(most=0), "most is 0: a draft needs at least 1 token"),
        (lambda: AdaptiveK(nodes=0), "nodes is 0"),
        (lambda: CostAware(Costs({1: 1.0}, DRAFTS), most=0), "most is 0"),
        (lambda: Costs({2: 1.0}, DRAFTS), "costs need a forward over 1 row"),
        (lambda: Costs({1: 1.0}, {}), "at least one proposal"),
        (lambda: Costs({1: 0.0}, DRAFTS), "0 seconds for plain decoding"),
        (lambda: Costs({1: 1.0, 2: math.nan}, DRAFTS), "costs hold nan seconds"),
        (lambda: Costs({1: 1.0}, {Limit(1): DraftCost(1, -1.0)}), "costs hold -1.0 seconds"),
        (lambda: Costs({1: 1.0}, DRAFTS, catch_up=math.inf), "costs hold inf seconds"),
    ],
)
def test_what_cannot_be_is_reported(make: Callable[[], object], reason: str) -> None:
    """Guards against a division by zero in the middle of a text."""
    with pytest.raises(ValueError, match=reason):
        make()


# In real decoding.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock(noise=0.0)
    monkeypatch.setattr(time, "perf_counter", made)
    return made


TARGET, DRAFT = Cost(forward=0.010, row=0.0005), Cost(forward=0.001, row=0.0001)


def test_costs_are_those_of_the_machine(clock: FakeClock) -> None:
    """Guards against costs of other work than a step: of a forward that reads the text again, of a target without a
    cache, of a proposal whose cache is already at the end of the text.
    """
    target, draft = small(), small(seed=7)
    with charged(clock, {target.model: TARGET, draft.model: DRAFT}):
        costs = measure_costs(target, ModelDrafter(draft))
    assert costs.verify == pytest.approx({rows: 0.010 + 0.0005 * rows for rows in (1, 2, 4, 8, 16, 32, 65)})
    assert costs.catch_up == pytest.approx(0.0001)
    assert costs.draft.keys() == {Limit(depth) for depth in (1, 2, 4, 8)}
    for limit, proposal in costs.draft.items():
        assert proposal.nodes == limit.depth
        # One forward per level, with perhaps one more token to read in the first.
        assert proposal.seconds == pytest.approx(0.0011 * limit.depth, abs=0.00011)


class Queue:
    """The queued work of a device: a clock that stands still until the host waits for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def test_queued_work_is_waited_for_and_slow_work_measured_once(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against costs that are only a GPU's launch time, against work that is charged to the next measurement, and
    against minutes of measuring where one forward takes seconds.
    """
    target, draft, queue, rows = small(), small(seed=7), Queue(), []

    def wait(device: object) -> None:
        clock.advance(queue.seconds)
        queue.seconds = 0.0

    monkeypatch.setattr("specdecode.decoding.measure_costs.synchronise", wait)
    target.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with charged(queue, {target.model: Cost(2.0, 0.1), draft.model: Cost(1.0, 0.1)}):
        costs = measure_costs(target, ModelDrafter(draft))
    assert costs.verify == pytest.approx({rows: 2.0 + 0.1 * rows for rows in (1, 2, 4, 8, 16, 32, 65)})
    assert costs.draft[Limit(1)].seconds == pytest.approx(1.1, abs=0.11)
    # Once to warm up, and once measured.
    assert [rows.count(each) for each in costs.verify] == [2] * 7


def test_captures_are_no_costs(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a draft that is thought to be slow, because a forward of a new shape was captured meanwhile."""

    def capture() -> None:
        clock.advance(0.01 + 5.0)
        monkeypatch.setattr(CudaGraphs, "seconds", CudaGraphs.seconds + 5.0)

    assert _medians(small(), {"capturing": capture}) == {"capturing": pytest.approx(0.01)}


def test_first_times_and_busy_moments_are_no_costs(clock: FakeClock) -> None:
    """Guards against costs that include the compilation of a kernel, and against those of an unusually busy or quiet
    moment.
    """
    target, draft, seen, measured = small(), small(seed=7), set[tuple[object, int]](), 0

    def disturb(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal measured
        rows = kwargs["input_ids"].shape[1]
        clock.pace = 1.0
        if (module, rows) not in seen:
            seen.add((module, rows))
            clock.advance(10.0)
        elif module is target.model:
            # Seven numbers of rows, five times each.
            clock.pace = 2.0 if measured < 6 or measured >= 30 else 0.5 if 14 <= measured < 17 else 1.0
            measured += 1

    for lm in (target, draft):
        lm.model.register_forward_pre_hook(disturb, with_kwargs=True)
    with charged(clock, {target.model: TARGET, draft.model: DRAFT}):
        costs = measure_costs(target, ModelDrafter(draft))
    assert measured == 35
    assert costs.verify == pytest.approx({rows: 0.010 + 0.0005 * rows for rows in (1, 2, 4, 8, 16, 32, 65)})
    assert costs.catch_up == pytest.approx(0.0001)
    assert all(proposal.seconds < 0.0012 * limit.depth for limit, proposal in costs.draft.items())


def test_what_costs_less_than_the_noise_costs_nothing(clock: FakeClock) -> None:
    """Guards against a negative duration, which raises an error in the costs."""
    target, draft = small(), small(seed=7)
    with charged(clock, {target.model: TARGET, draft.model: Cost(0.001, -1e-6)}):
        assert measure_costs(target, ModelDrafter(draft)).catch_up == 0.0


def test_a_drafter_is_measured_on_a_text_that_goes_on_and_repeats_itself() -> None:
    """Guards against the cost of a cached proposal, and of a search that finds nothing."""
    lookup, seen = PromptLookup(), []

    class Listening:
        forwards = 0
        layers = ()

        def propose(self, context: Context, limit: Limit) -> DraftTree:
            tree = lookup.propose(context, limit)
            seen.append((len(context.tokens), limit.depth, tree.depth))
            return tree

    measure_costs(small(), Listening())
    lengths, asked, proposed = zip(*seen, strict=True)
    assert asked == proposed
    assert {after - before for before, after in itertools.pairwise(lengths)} == {1, 32}


def test_a_drafter_that_finds_nothing_is_taken_to_propose_chains() -> None:
    """Guards against verification without a cost in a later text where the drafter does find proposals."""
    assert all(proposal.nodes == limit.depth for limit, proposal in measure_costs(small(), NoDraft()).draft.items())


def test_a_cascade_is_priced_as_its_last_drafter(clock: FakeClock) -> None:
    """Guards against drafts without a cost because a lookup answers on the measured text: no draft would then be too
    long.
    """
    target, draft = small(), small(seed=7)
    with charged(clock, {target.model: TARGET, draft.model: DRAFT}):
        alone = measure_costs(target, ModelDrafter(draft))
        inner = Cascade(PromptLookup(), ModelDrafter(draft))
        found = [measure_costs(target, cascade) for cascade in (inner, Cascade(PromptLookup(), inner))]
    seconds = {limit: pytest.approx(proposal.seconds) for limit, proposal in alone.draft.items()}
    for costs in found:
        assert {limit: proposal.seconds for limit, proposal in costs.draft.items()} == seconds
        assert costs.catch_up == pytest.approx(alone.catch_up)


def test_trees_are_priced_by_their_nodes(clock: FakeClock) -> None:
    """Guards against a tree that is priced as a chain, and against the same tree measured again and again."""
    target, draft = small(), small(seed=7)
    drafter = ModelDrafter(draft, StaticTree((2, 2, 1), nodes=10))
    with charged(clock, {target.model: TARGET, draft.model: DRAFT}):
        costs = measure_costs(target, drafter)
    sizes = {limit: proposal.nodes for limit, proposal in costs.draft.items()}
    wide, narrow = {1: 2, 2: 6, 4: 10, 8: 10}, {1: 2, 2: 4, 4: 4, 8: 4}
    expected = {Limit(depth, 64): size for depth, size in wide.items()}
    assert sizes == expected | {Limit(depth, 4): size for depth, size in narrow.items()}
    assert costs.draft[Limit(8, 4)].seconds < costs.draft[Limit(8, 64)].seconds
    lookup = measure_costs(target, PromptLookup()).draft
    assert {limit: proposal.nodes for limit, proposal in lookup.items()} == {Limit(d): d for d in (1, 2, 4, 8)}


def test_a_target_is_measured_once_and_then_let_go() -> None:
    """Guards against seconds of measuring for every drafter of the same target, and against models kept in memory by
    their costs.
    """
    target, rows = small(), []
    first = measure_costs(target, NoDraft())
    hook = target.model.register_forward_pre_hook(lambda *_: rows.append(1))
    assert measure_costs(target, PromptLookup()).verify == first.verify
    assert rows == []
    hook.remove()
    gone = weakref.ref(target)
    del target, hook
    gc.collect()
    assert gone() is None


def test_a_measured_drafter_proposes_what_a_fresh_one_would() -> None:
    """Guards against a drafter that still holds the text on which it was measured."""
    target = small(num_hidden_layers=2)
    for make in (PromptLookup, lambda: ModelDrafter(target.subset([0]), StaticTree((2, 2)))):
        used = make()
        measure_costs(target, used)
        runs = [generate(target, prompt(), drafter=drafter, max_new_tokens=30) for drafter in (used, make())]
        told = [[(step.drafted, step.accepted) for step in run.steps] for run in runs]
        assert told[0] == told[1]


@pytest.mark.parametrize("name", ["gpt-2", "opt"])
def test_a_short_context_can_be_measured(name: str) -> None:
    """Guards against a measurement at positions beyond the model's context."""
    size = {"gpt-2": "n_positions", "opt": "max_position_embeddings"}[name]
    target = LM(build(ARCHITECTURES[name] | {size: 20}))
    costs = measure_costs(target, ModelDrafter(target.subset([0])))
    assert costs.verify.keys() == {1, 2, 4, 8, 16}
    controller = CostAware(costs)
    assert len(generate(target, prompt(), controller=controller, max_new_tokens=6).tokens) == 6


@pytest.mark.parametrize("shape", [Chain(), StaticTree((2, 2, 1))], ids=str)
def test_decoding_is_as_fast_as_the_draft_lets_it_be(clock: FakeClock, shape: TreeShape) -> None:
    """Guards against a simulator that differs from real decoding in rows, depths or times of steps."""
    target, equal, other = (small(seed, initializer_range=1.0) for seed in (2, 2, 7))
    with charged(clock, {target.model: TARGET, equal.model: DRAFT, other.model: DRAFT}):

        def taken(drafter: Drafter, make: Callable[[], Controller]) -> float:
            started = clock()
            result = generate(target, prompt(), drafter=drafter, controller=make(), max_new_tokens=100)
            assert result.tokens == expected
            return clock() - started

        expected = generate(target, prompt(), max_new_tokens=100).tokens
        plain = taken(NoDraft(), Plain)
        useful, useless = (functools.partial(ModelDrafter, draft, shape) for draft in (equal, other))
        fixed = min(taken(useful(), functools.partial(FixedK, k)) for k in (4, 12))
        own = taken(useful(), functools.partial(CostAware, measure_costs(target, useful())))
        assert own <= min(1.1 * fixed, 0.6 * plain)
        assert taken(useless(), functools.partial(CostAware, measure_costs(target, useless()))) <= 1.03 * plain
