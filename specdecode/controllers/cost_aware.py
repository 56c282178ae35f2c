"""A controller that drafts where it pays, by the costs measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from specdecode.controllers.adaptive import OBSERVATION_DECAY
from specdecode.controllers.base import Limit, check_positive
from specdecode.core.result import Step


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Hold the size of a proposal and its cost.

    Attributes:
        nodes: proposed tokens.
        seconds: taken to propose them.
    """

    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Hold the costs of a step's parts, for one machine, target and drafter. `measure_costs` measures them.

    Attributes:
        verify: seconds of a target forward by its rows: the root and the proposals.
        draft: proposals by their limit. There are several numbers of nodes where they make different trees.
        catch_up: seconds that the draft takes to read a token that was committed without it.

    Raises:
        ValueError: nothing measured, or a value that is no duration.
    """

    verify: Mapping[int, float]
    draft: Mapping[Limit, DraftCost]
    catch_up: float = 0.0

    def __post_init__(self) -> None:
        if 1 not in self.verify or not self.draft:
            raise ValueError("costs need a forward over 1 row, which is plain decoding, and at least one proposal")
        durations = [*self.verify.values(), *(draft.seconds for draft in self.draft.values()), self.catch_up]
        if wrong := [seconds for seconds in durations if not 0.0 <= seconds < math.inf]:
            raise ValueError(f"costs hold {wrong[0]} seconds: a duration is a number from 0")
        if self.verify[1] == 0.0:
            raise ValueError("costs hold 0 seconds for plain decoding: a target forward takes some time")

    def verify_s(self, rows: int) -> float:
        """Return the seconds of a target forward, interpolated linearly."""
        return _between(self.verify, rows)

    def drafts(self, most: int) -> dict[int, list[DraftCost]]:
        """Return, for each number of nodes, the proposals of depth 1, 2, ..., `most`, interpolated linearly."""
        drafts = {}
        for nodes in sorted({limit.nodes for limit in self.draft}):
            measured = {limit.depth: draft for limit, draft in self.draft.items() if limit.nodes == nodes}
            sizes = {depth: draft.nodes for depth, draft in measured.items()}
            seconds = {depth: draft.seconds for depth, draft in measured.items()}
            depths = range(1, most + 1)
            drafts[nodes] = [DraftCost(round(_between(sizes, at)), _between(seconds, at)) for at in depths]
        return drafts


def _between(values: Mapping[int, float], at: int) -> float:
    """Return the value at a place on the line through the two nearest measured places, at least 0."""
    if len(values) == 1:
        return next(iter(values.values()))
    places = sorted(values)
    right = next((i for i, place in enumerate(places[1:-1], start=1) if place >= at), len(places) - 1)
    low, high = places[right - 1], places[right]
    return max(values[low] + (values[high] - values[low]) * (at - low) / (high - low), 0.0)


# In plain steps: what a trial may lose at first, and what it may lose after gains.
_INITIAL_STAKE, _LARGEST_STAKE = 2.0, 12.0
# Share of the stake that one step may risk, unless even the cheapest draft could lose more.
_RISK_SHARE = 0.25
# Share of all time that probing may cost.
_PROBE_SHARE = 0.01

# A trial begins as if this share of three earlier proposals had been accepted; and at every further depth as if three
# had been accepted with the share of the depth above.
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.8, 3.0
# A draft is deeper than what was accepted in its trial by this many tokens at most: beyond it, acceptance is a guess.
_DEPTH_AHEAD = 6
# With m nodes in place of n, (n / m) to this power times as many proposals are assumed to be rejected: a power law, as
# in Sequoia (Chen et al. 2024).
_NODES_EXPONENT = 0.4

# Standard errors, as shares: of the measured costs, and of the time of a step ...
_COST_ERROR, _STEP_TIME_ERROR = 0.5, 0.1
# ... and variances of the drift in each step: of drafting and verifying together, and of each by itself.
_DRIFT, _DRIFT_APART = 3e-4, 3e-4
# A plain step is made when the standard error of its time is a larger share than this.
_PLAIN_ERROR_LIMIT = 0.2
# A draft must catch up with at least this many tokens before the step's time shows what one of them costs.
_LEGIBLE_TOKENS = 16


class CostAware:
    """Draft as deep and as wide as pays, and not at all where nothing pays.

    It takes the limit with the most tokens per second, E[emitted] / seconds. A step of depth d emits
    1 + a1 + a1 a2 + ... + a1...ad tokens on average, where ai is the acceptance of a proposal at depth i whose parent
    was accepted (Leviathan et al. 2023, section 3.3, with an acceptance for each depth). The acceptances are counted,
    older steps less; an empty proposal does not count. The seconds are those of `costs`, corrected by the observed
    times of the steps.

    Speculation runs in trials, so that drafts make decoding slower than plain decoding by a few percent at most. Let
    the time of a plain step be the unit. A trial has a stake of 2. Each of its steps adds (tokens - time), and no step
    is taken that could lose more than the stake. So a trial loses 2 at most, whatever was expected. It ends when no
    limit is expected to beat plain decoding. After n plain steps a probe, the cheapest draft that could pay, costs
    c + r n: what the last trial lost, and the draft's reading of n tokens. It is made once
    2^(f - 1) c + r n <= n / 100, where f counts the trials in a row that lost. So probes take at most 1 % of the time,
    and half as much after each failure. A probe with an accepted proposal begins a new trial. If not even a draft that
    is accepted whole could pay, there is no probe.

    A controller may serve one text after another, and keeps what it has learnt. In a batch each prompt has its own
    controller, which counts the whole time of shared forwards.

    Args:
        costs: of this target and this drafter.
        most: the largest depth.

    Raises:
        ValueError: most below 1.
    """

    def __init__(self, costs: Costs, most: int = 16) -> None:
        check_positive("most", most)
        self.costs = costs
        self.most = most
        self._pace = _Pace(costs.verify_s(1))
        self._options = {
            nodes: [
                _Option(Limit(depth, nodes), draft.seconds, costs.verify_s(1 + draft.nodes))
                for depth, draft in enumerate(drafts, start=1)
            ]
            for nodes, drafts in costs.drafts(most).items()
        }
        self._trial: _Trial | None = _Trial(self._options)
        self._failures = 0
        self._lost = 0.0  # plain steps of time, by the last trial
        self._waited = 0.0  # plain steps since then
        self._unread = 1  # tokens that the draft has to catch up with: at first the prompt
        self._catch_up = costs.catch_up / costs.verify_s(1)  # plain steps of time for one of them
        self._chosen: _Option | None = self._decide()

    def limit(self) -> Limit:
        return Limit(0) if self._chosen is None else self._chosen.limit

    def observe(self, step: Step) -> None:
        # The first step of a text also reads the prompt, so its time says nothing about other steps.
        alone = step.rows == step.drafted + 1
        if self._chosen is not None and step.drafted:
            uncertain = self._learn(self._chosen, step, alone)
            # All options are compared with a plain step, so its time must be known well.
            self._chosen = None if uncertain else self._decide()
        else:
            self._learn_plain(step, alone)
            self._chosen = self._decide()

    def _learn_plain(self, step: Step, alone: bool) -> None:
        if alone:
            self._pace.learn(step.total_s - step.draft_s, 0.0, self.costs.verify_s(1))
            # An empty proposal takes time too.
            proposing = step.draft_s / self._pace.plain_s
            self._waited -= proposing / _PROBE_SHARE
            if self._trial is not None:
                self._trial.add(-proposing)
        self._waited += step.emitted
        if self._chosen is not None:
            self._unread = 0
        else:
            self._unread = (self._unread if alone else step.rows - 1) + step.emitted

    def _learn(self, option: _Option, step: Step, alone: bool) -> bool:
        """Learn from a step with a draft; return whether it leaves the time of a plain step uncertain."""
        verify_s = self.costs.verify_s(step.drafted + 1)
        uncertain = False
        if alone and not self._unread:
            self._pace.learn(step.total_s, option.draft_s, verify_s)
            uncertain = self._pace.plain_error > _PLAIN_ERROR_LIMIT
        drafting, verifying = self._pace.units
        time = drafting * option.draft_s + verifying * verify_s
        if alone and self._unread >= _LEGIBLE_TOKENS:
            catch_up = max(step.total_s / self._pace.plain_s - time, 0.0) / self._unread
            self._catch_up += (catch_up - self._catch_up) / 2
        self._unread = 0
        if self._trial is None and step.accepted:
            self._trial = _Trial(self._options)
        if self._trial is None:
            self._end(time - step.emitted)
        else:
            self._trial.observe(step, option.limit, step.emitted - time)
        return uncertain

    def _decide(self) -> _Option | None:
        """Return the option of the next step; None for a plain step."""
        if self._trial is not None:
            if (best := self._trial.best(*self._pace.units)) is not None:
                return best
            self._end(-self._trial.gained)
        factor = 2.0 ** (self._failures - 1)
        allowance = _PROBE_SHARE * self._waited - self._catch_up * self._unread
        if allowance < factor * self._lost:
            return None
        drafting, verifying = self._pace.units
        times = {
            option: drafting * option.draft_s + verifying * option.verify_s
            for options in self._options.values()
            for option in options
        }
        could_pay = [option for option, time in times.items() if option.limit.depth + 1 > time]
        probe = min(could_pay, key=times.__getitem__, default=None)
        return probe if probe is not None and allowance >= factor * (times[probe] - 1.0) else None

    def _end(self, loss: float) -> None:
        """End a trial or a probe that lost so many plain steps of time."""
        self._trial = None
        self._failures = self._failures + 1 if loss > 0.0 else 1
        self._lost = loss
        self._waited = 0.0


@dataclass(frozen=True, slots=True)
class _Option:
    """Hold a limit and the seconds that it was measured to cost."""

    limit: Limit
    draft_s: float
    verify_s: float


class _Trial:
    """Count the gains and acceptances of speculation while it pays.

    Attributes:
        stake: plain steps of time that it may still lose.
        gained: plain steps of time gained in all.
    """

    def __init__(self, options: Mapping[int, Sequence[_Option]]) -> None:
        self.stake = _INITIAL_STAKE
        self.gained = 0.0
        self._options = options
        self._deepest = _DEPTH_AHEAD
        self._levels = {nodes: _Levels(len(by_depth)) for nodes, by_depth in options.items()}

    def observe(self, step: Step, limit: Limit, gain: float) -> None:
        """Count a step with a draft that gained so many plain steps of time."""
        self.add(gain)
        self._deepest = max(self._deepest, step.accepted + _DEPTH_AHEAD)
        for nodes, levels in self._levels.items():
            # A tree that did not fill its limit is the same under every limit that it fits in.
            same = step.drafted < limit.nodes and step.drafted <= nodes
            levels.observe(step, limit, 1.0 if same else (limit.nodes / nodes) ** _NODES_EXPONENT)

    def add(self, gain: float) -> None:
        self.gained += gain
        self.stake = min(self.stake + gain, _LARGEST_STAKE)

    def best(self, drafting: float, verifying: float) -> _Option | None:
        """Return the option with the most tokens for its time; None if plain decoding has more.

        Args:
            drafting: plain steps of time for a measured second of drafting.
            verifying: the same for verifying.
        """
        shallowest = [options[0] for options in self._options.values()]
        cheapest = min(drafting * option.draft_s + verifying * option.verify_s for option in shallowest) - 1.0
        risk = min(max(_RISK_SHARE * self.stake, cheapest), self.stake)
        best, most = None, 1.0
        for nodes, options in self._options.items():
            tokens = chance = 1.0
            acceptances = self._levels[nodes].acceptances()
            for option, acceptance in zip(options[: self._deepest], acceptances, strict=False):
                chance *= acceptance
                tokens += chance
                time = drafting * option.draft_s + verifying * option.verify_s
                if tokens > most * time and time - 1.0 <= risk:
                    best, most = option, tokens / time
        return best


class _Levels:
    """Estimate the acceptance of proposals by their depth."""

    def __init__(self, most: int) -> None:
        self._accepted = [_PRIOR_ACCEPTANCE * _PRIOR_WEIGHT] + [0.0] * (most - 1)
        self._decided = [_PRIOR_WEIGHT] + [0.0] * (most - 1)

    def observe(self, step: Step, limit: Limit, rejections: float) -> None:
        """Count a step, its rejection as so many. Beyond the end of a draft nothing is accepted, up to its limit."""
        rejected = step.accepted < min(limit.depth, step.emitted)
        for level in range(len(self._decided)):
            accepted = float(level < step.accepted)
            decided = accepted + rejections * (rejected and level == step.accepted)
            self._accepted[level] = OBSERVATION_DECAY * self._accepted[level] + accepted
            self._decided[level] = OBSERVATION_DECAY * self._decided[level] + decided

    def acceptances(self) -> Iterator[float]:
        """Yield the acceptance at depth 1, 2, ...; a depth with few observations resembles the one above."""
        above = self._accepted[0] / self._decided[0]
        for accepted, decided in zip(self._accepted, self._decided, strict=True):
            above = (accepted + _PRIOR_WEIGHT * above) / (decided + _PRIOR_WEIGHT)
            yield above


class _Pace:
    """Estimate how much longer steps take than measured: a factor on drafting, and one on verifying.

    A Kalman filter (Kalman 1960) tracks the two factors, which drift, mostly together. It uses the times of whole
    steps. On a GPU, queued draft work is waited for while verifying, so the host clock cannot separate the two. Steps
    of different depth can, plain steps most of all.
    """

    def __init__(self, plain_s: float) -> None:
        self._measured_s = plain_s
        self._factors = [1.0, 1.0]
        self._covariance = [[_COST_ERROR**2, 0.0], [0.0, _COST_ERROR**2]]

    @property
    def plain_s(self) -> float:
        """Seconds of a plain step."""
        return self._factors[1] * self._measured_s

    @property
    def plain_error(self) -> float:
        """The standard error of `plain_s`, as a share of it."""
        return math.sqrt(self._covariance[1][1]) / self._factors[1]

    @property
    def units(self) -> tuple[float, float]:
        """Plain steps of time for a measured second of drafting, and for one of verifying."""
        return self._factors[0] / self.plain_s, self._factors[1] / self.plain_s

    def learn(self, seconds: float, draft_s: float, verify_s: float) -> None:
        """Correct the factors by a step's seconds, given the measured seconds of its parts."""
        factors, covariance = self._factors, self._covariance
        for i, j in product((0, 1), repeat=2):
            covariance[i][j] += (_DRIFT + _DRIFT_APART * (i == j)) * factors[i] * factors[j]
        expected = factors[0] * draft_s + factors[1] * verify_s
        # Now and then the machine is busy with something else, and a step takes ten times as long.
        error = min(max(seconds - expected, -expected / 2), expected)
        projected = [row[0] * draft_s + row[1] * verify_s for row in covariance]
        variance = projected[0] * draft_s + projected[1] * verify_s + (_STEP_TIME_ERROR * expected) ** 2
        for i in (0, 1):
            factors[i] = max(factors[i] + projected[i] / variance * error, factors[i] / 4)
        for i, j in product((0, 1), repeat=2):
            covariance[i][j] -= projected[i] * projected[j] / variance


def examples() -> dict[str, Callable[[], CostAware]]:
    """Return factories of configured controllers, by name."""
    free = Costs({1: 1e-3}, {Limit(1): DraftCost(1, 0.0), Limit(5): DraftCost(5, 0.0)})
    dear = Costs({1: 1e-3, 65: 3e-3}, {Limit(1): DraftCost(1, 2e-4), Limit(5): DraftCost(5, 1e-3)}, catch_up=1e-6)
    trees = {Limit(d, n): DraftCost(n, 1e-4 * d) for d in (1, 2, 4) for n in (4, 8)}
    return {
        "cost-aware-free": lambda: CostAware(free, most=5),
        "cost-aware-dear": lambda: CostAware(dear, most=5),
        "cost-aware-trees": lambda: CostAware(Costs({1: 1e-3}, trees)),
    }
