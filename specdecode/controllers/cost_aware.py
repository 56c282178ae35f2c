"""A controller that drafts where drafting saves time, by the costs measured on this machine."""

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
    """The size and the cost of a proposal.

    Attributes:
        nodes: number of proposed tokens.
        seconds: time to propose them.
    """

    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a step's parts, for one machine, target and drafter. `measure_costs` measures them.

    Attributes:
        verify: seconds of a target forward by its rows: the root and the proposals.
        draft: size and cost of proposals by their limit. Limits have several numbers of nodes where these give
            different trees.
        catch_up: seconds in which the draft reads one token that was committed without a proposal.

    Raises:
        ValueError: nothing was measured, or a value is no duration.
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
    """Interpolate linearly between the two nearest measured places, or extrapolate; return at least 0."""
    if len(values) == 1:
        return next(iter(values.values()))
    places = sorted(values)
    right = next((i for i, place in enumerate(places[1:-1], start=1) if place >= at), len(places) - 1)
    low, high = places[right - 1], places[right]
    return max(values[low] + (values[high] - values[low]) * (at - low) / (high - low), 0.0)


# The most that a trial may lose, in plain steps of time: at first, and after gains.
_INITIAL_STAKE, _LARGEST_STAKE = 2.0, 12.0
# Share of the stake that one step may risk; more, up to the stake, where even the cheapest draft could lose more.
_RISK_SHARE = 0.25
# Share of all time that probing may cost.
_PROBE_SHARE = 0.01

# Prior of a trial: three proposals at depth 1, of which this share was accepted. At each further depth three proposals
# with the acceptance of the depth above.
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.8, 3.0
# Most tokens by which a draft is deeper than the longest accepted path of its trial: beyond, acceptance is a guess.
_DEPTH_AHEAD = 6
# With m nodes instead of n, the number of rejections is assumed to change by the factor (n / m) to this power: a power
# law, as in Sequoia (Chen et al. 2024).
_NODES_EXPONENT = 0.4

# Standard errors, as shares: of the measured costs, and of the time of a step.
_COST_ERROR, _STEP_TIME_ERROR = 0.5, 0.1
# Variances of the drift in each step: of drafting and verifying together, and of each separately.
_DRIFT, _DRIFT_APART = 3e-4, 3e-4
# A plain step follows when the standard error of its time is a larger share than this.
_PLAIN_ERROR_LIMIT = 0.2
# Least number of unread tokens at which the time of a step shows the cost of reading one.
_LEGIBLE_TOKENS = 16


class CostAware:
    """A controller that chooses the limit with the most tokens per second, or no draft where no draft saves time.

    It maximises E[emitted] / seconds. A step of depth d emits 1 + a1 + a1 a2 + ... + a1...ad tokens on average. Here ai
    is the acceptance of a proposal at depth i whose parent was accepted (Leviathan et al. 2023, section 3.3, with an
    acceptance for each depth). The acceptances are counted with less weight for older steps; empty proposals do not
    count. The seconds are those of `costs`, corrected by the observed times of the steps.

    Speculation runs in trials, so that drafts make decoding slower than plain decoding by a few percent at most. The
    unit of time is a plain step. A trial starts with a stake of 2. Each of its steps adds (tokens - time) to the stake,
    and a step that could lose more than the stake is not allowed. So a trial loses 2 at most, even if the estimates are
    wrong. It ends when no limit is expected to beat plain decoding.

    Then come plain steps and, at times, a probe: the cheapest draft that could pay. After n plain steps a probe costs
    c + r n: c is the loss of the last trial, r n the time in which the draft reads n tokens. A probe follows once
    2^(f - 1) c + r n <= n / 100. Here f is 1 after the first loss or after a trial without loss, and each further lost
    trial or probe adds 1. So probes use at most 1 % of the time, and half as much after each failure. A probe with an
    accepted proposal begins a new trial. There is no probe if even a fully accepted draft could not pay.

    A controller may serve one text after another, and keeps its estimates. In a batch each prompt has its own
    controller, which counts the whole time of shared forwards.

    Args:
        costs: costs of this target and this drafter.
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
        self._lost = 0.0  # loss of the last trial, in plain steps of time
        self._waited = 0.0  # plain steps since then
        self._unread = 1  # committed tokens that the draft has not read: at first the prompt
        self._catch_up = costs.catch_up / costs.verify_s(1)  # plain steps of time to read one of them
        self._chosen: _Option | None = self._decide()

    def limit(self) -> Limit:
        return Limit(0) if self._chosen is None else self._chosen.limit

    def observe(self, step: Step) -> None:
        # The first step of a text also reads the prompt, so its time is no measure of other steps.
        alone = step.rows == step.drafted + 1
        if self._chosen is not None and step.drafted:
            uncertain = self._learn(self._chosen, step, alone)
            # All options are compared with a plain step. So if its time is uncertain, the next step is plain.
            self._chosen = None if uncertain else self._decide()
        else:
            self._learn_plain(step, alone)
            self._chosen = self._decide()

    def _learn_plain(self, step: Step, alone: bool) -> None:
        if alone:
            self._pace.learn(step.total_s - step.draft_s, 0.0, self.costs.verify_s(1))
            # An empty proposal costs time too.
            proposing = step.draft_s / self._pace.plain_s
            self._waited -= proposing / _PROBE_SHARE
            if self._trial is not None:
                self._trial.add(-proposing)
        self._waited += step.emitted
        if self._chosen is not None and alone:
            self._unread = 0
        else:  # in the first step a draft does not read the prompt yet
            self._unread = (self._unread if alone else step.rows - 1) + step.emitted

    def _learn(self, option: _Option, step: Step, alone: bool) -> bool:
        """Learn from a step with a draft; return whether the time of a plain step is now uncertain."""
        verify_s = self.costs.verify_s(step.drafted + 1)
        uncertain = False
        if alone and not self._unread and step.allowed >= option.limit.depth:
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
        """End a trial or a probe.

        Args:
            loss: plain steps of time that it lost.
        """
        self._trial = None
        self._failures = self._failures + 1 if loss > 0.0 else 1
        self._lost = loss
        self._waited = 0.0


@dataclass(frozen=True, slots=True)
class _Option:
    """A limit with the measured seconds of its draft and of its verification."""

    limit: Limit
    draft_s: float
    verify_s: float


class _Trial:
    """A series of steps with drafts, with its gains and acceptances.

    Attributes:
        stake: plain steps of time that the trial may still lose.
        gained: plain steps of time gained in all.
    """

    def __init__(self, options: Mapping[int, Sequence[_Option]]) -> None:
        self.stake = _INITIAL_STAKE
        self.gained = 0.0
        self._options = options
        self._deepest = _DEPTH_AHEAD
        self._levels = {nodes: _Levels(len(by_depth)) for nodes, by_depth in options.items()}

    def observe(self, step: Step, limit: Limit, gain: float) -> None:
        """Count a step with a draft.

        Args:
            step: the step.
            limit: limit of its draft.
            gain: plain steps of time that it gained.
        """
        self.add(gain)
        self._deepest = max(self._deepest, step.accepted + _DEPTH_AHEAD)
        for nodes, levels in self._levels.items():
            # A tree that did not fill its limit is the same tree under every limit that holds it.
            same = step.drafted < limit.nodes and step.drafted <= nodes
            levels.observe(step, limit, 1.0 if same else (limit.nodes / nodes) ** _NODES_EXPONENT)

    def add(self, gain: float) -> None:
        self.gained += gain
        self.stake = min(self.stake + gain, _LARGEST_STAKE)

    def best(self, drafting: float, verifying: float) -> _Option | None:
        """Return the option with the most tokens per time; None if plain decoding is expected to be faster.

        Args:
            drafting: plain steps of time for a measured second of drafting.
            verifying: plain steps of time for a measured second of verifying.
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
    """Estimates of the acceptance of proposals, by depth."""

    def __init__(self, most: int) -> None:
        self._accepted = [_PRIOR_ACCEPTANCE * _PRIOR_WEIGHT] + [0.0] * (most - 1)
        self._decided = [_PRIOR_WEIGHT] + [0.0] * (most - 1)

    def observe(self, step: Step, limit: Limit, rejections: float) -> None:
        """Count a step. A proposal that is missing below the limit counts as rejected, unless the step allowed no
        deeper draft.

        Args:
            step: the step.
            limit: limit of its draft.
            rejections: weight of its rejection.
        """
        rejected = step.accepted < min(limit.depth, step.allowed, step.emitted)
        for level in range(len(self._decided)):
            accepted = float(level < step.accepted)
            decided = accepted + rejections * (rejected and level == step.accepted)
            self._accepted[level] = OBSERVATION_DECAY * self._accepted[level] + accepted
            self._decided[level] = OBSERVATION_DECAY * self._decided[level] + decided

    def acceptances(self) -> Iterator[float]:
        """Yield the acceptance at depth 1, 2, ...; a depth with few observations resembles the depth above it."""
        above = self._accepted[0] / self._decided[0]
        for accepted, decided in zip(self._accepted, self._decided, strict=True):
            above = (accepted + _PRIOR_WEIGHT * above) / (decided + _PRIOR_WEIGHT)
            yield above


class _Pace:
    """Estimates of two factors on the measured costs: a factor on drafting, and a factor on verifying.

    A Kalman filter (Kalman 1960) tracks the factors, which drift, mostly together. It uses the times of whole steps: on
    a GPU, verification waits for queued draft work, so the host clock cannot separate the two parts. Steps of different
    depth can separate them, plain steps most of all.
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
        """Standard error of `plain_s`, as a share of it."""
        return math.sqrt(self._covariance[1][1]) / self._factors[1]

    @property
    def units(self) -> tuple[float, float]:
        """Plain steps of time for a measured second of drafting, and for a measured second of verifying."""
        return self._factors[0] / self.plain_s, self._factors[1] / self.plain_s

    def learn(self, seconds: float, draft_s: float, verify_s: float) -> None:
        """Correct the factors by a step's seconds, given the measured seconds of its parts."""
        factors, covariance = self._factors, self._covariance
        for i, j in product((0, 1), repeat=2):
            covariance[i][j] += (_DRIFT + _DRIFT_APART * (i == j)) * factors[i] * factors[j]
        expected = factors[0] * draft_s + factors[1] * verify_s
        # Other work on the machine sometimes makes a step ten times as long.
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
