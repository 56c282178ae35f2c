"""How long to draft, and whether to, by what pays on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from specdecode.controllers.adaptive import KEPT
from specdecode.controllers.base import Limit, check_positive
from specdecode.core.result import Step


@dataclass(frozen=True, slots=True)
class Draft:
    """What one proposal is: its size and its price.

    Attributes:
        nodes: proposed tokens.
        seconds: of proposing them.
    """

    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a step cost on one machine, with one target and one drafter. `measure_costs` finds it out.

    Attributes:
        verify: seconds of a target forward by its rows, which are the root and the proposals.
        draft: proposals by their limit. Where a smaller number of nodes makes another tree, several are there.
        catch_up: seconds that a draft takes to read a token which was committed without it.

    Raises:
        ValueError: nothing measured, or what is no duration.
    """

    verify: Mapping[int, float]
    draft: Mapping[Limit, Draft]
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
        """Seconds of a target forward: linear between the measured ones."""
        return _between(self.verify, rows)

    def drafts(self, most: int) -> dict[int, list[Draft]]:
        """For each number of nodes, the proposals of depth 1, 2, ..., `most`: linear between the measured ones."""
        found = {}
        for nodes in sorted({limit.nodes for limit in self.draft}):
            measured = {limit.depth: draft for limit, draft in self.draft.items() if limit.nodes == nodes}
            sizes = {depth: draft.nodes for depth, draft in measured.items()}
            seconds = {depth: draft.seconds for depth, draft in measured.items()}
            depths = range(1, most + 1)
            found[nodes] = [Draft(round(_between(sizes, at)), _between(seconds, at)) for at in depths]
        return found


def _between(values: Mapping[int, float], at: int) -> float:
    """The value at a place, on the line through the two places nearest to it; not below nought."""
    if len(values) == 1:
        return next(iter(values.values()))
    places = sorted(values)
    right = next((i for i, place in enumerate(places[1:-1], start=1) if place >= at), len(places) - 1)
    low, high = places[right - 1], places[right]
    return max(values[low] + (values[high] - values[low]) * (at - low) / (high - low), 0.0)


# In plain steps: what a trial may lose, and what of its gains it may lose again; and the share of it that one step
# may, unless even the cheapest draft could lose more.
_STAKE, _MOST_STAKE, _RISK = 2.0, 12.0, 0.25
# The share of the time that trying again may cost.
_SHARE = 0.01

# A trial begins as if of three proposals before, this share had been accepted; and at every further depth as if of
# three it had been the share of the depth above.
_PRIOR, _PRIOR_WEIGHT = 0.8, 3.0
# No draft is deeper than what was accepted in its trial by more than this: beyond it, acceptance is a guess.
_AHEAD = 6
# With m nodes in place of n, (n / m) to this power times as many proposals are taken to be rejected: a power law, as in
# Sequoia (Chen et al. 2024).
_POWER = 0.4

# Standard errors, as shares: of the costs at the start, and of the time of a step ...
_MISMEASURED, _NOISE = 0.5, 0.1
# ... and variances by which the pace drifts in a step: of all together, and of drafting and verifying each.
_DRIFT, _DRIFT_APART = 3e-4, 3e-4
# A plain step is made where the time of one is no better known than this.
_DOUBT = 0.2
# Fewer tokens that the draft catches up with do not tell what one of them costs.
_LEGIBLE = 16


class CostAware:
    """As deep and as wide as pays, and no draft where none does.

    Of all limits it takes the one with the most tokens a second, E[emitted] / seconds. A step of depth d emits
    1 + a1 + a1 a2 + ... + a1...ad tokens in the mean, where ai is the acceptance of a proposal at depth i whose parent
    was accepted (Leviathan et al. 2023, section 3.3, with an acceptance for each depth). These are counted, older steps
    less; an empty proposal says nothing. The seconds are those of `costs`, corrected by what steps really take.

    Speculation runs in trials, so that no draft makes decoding slower than plain decoding by more than a few percent.
    Let the time of a plain step be the unit. A trial has a stake of 2; each of its steps adds (tokens - time), and none
    is taken that could lose more than there is. So a trial loses 2 at most, whatever was expected. It ends when no
    limit is expected to beat plain decoding. After n plain steps a probe, which is the cheapest draft that could pay,
    costs c + r n: what the last trial lost, and the draft's reading of n tokens. It is made once
    2^(f - 1) c + r n <= n / 100, where f counts the trials in a row that lost: so probes take 1 % of the time at most,
    and with each failure half as much. A probe of which something is accepted begins a new trial. If not even a draft
    that is accepted whole could pay, there is none.

    It may serve one text after another, and goes on with what it has learnt. In a batch each prompt has one of its own,
    which takes the time of the forwards that they share for its own.

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
        self._lost = 0.0  # by the last trial
        self._waited = 0.0  # since then
        self._unread = 1  # tokens that the draft has to catch up with: at first there is the prompt
        self._reading = costs.catch_up / costs.verify_s(1)  # for each of them
        self._asked: _Option | None = self._decide()

    def limit(self) -> Limit:
        return Limit(0) if self._asked is None else self._asked.limit

    def observe(self, step: Step) -> None:
        # The first step of a text carries the prompt: its time tells nothing of others.
        alone = step.rows == step.drafted + 1
        if self._asked is not None and step.drafted:
            doubtful = self._learn(self._asked, step, alone)
            # What plain decoding takes is what all is compared with.
            self._asked = None if doubtful else self._decide()
        else:
            self._learn_plain(step, alone)
            self._asked = self._decide()

    def _learn_plain(self, step: Step, alone: bool) -> None:
        if alone:
            self._pace.learn(step.total_s - step.draft_s, 0.0, self.costs.verify_s(1))
            # Asking in vain is paid for too.
            asking = step.draft_s / self._pace.plain_s
            self._waited -= asking / _SHARE
            if self._trial is not None:
                self._trial.add(-asking)
        self._waited += step.emitted
        if self._asked is not None:
            self._unread = 0
        else:
            self._unread = (self._unread if alone else step.rows - 1) + step.emitted

    def _learn(self, asked: _Option, step: Step, alone: bool) -> bool:
        """Whether, of what it has seen last, the time of a plain step is in doubt."""
        verify_s = self.costs.verify_s(step.drafted + 1)
        doubtful = False
        if alone and not self._unread:
            self._pace.learn(step.total_s, asked.draft_s, verify_s)
            doubtful = self._pace.doubt > _DOUBT
        drafting, verifying = self._pace.units
        time = drafting * asked.draft_s + verifying * verify_s
        if alone and self._unread >= _LEGIBLE:
            reading = max(step.total_s / self._pace.plain_s - time, 0.0) / self._unread
            self._reading += (reading - self._reading) / 2
        self._unread = 0
        if self._trial is None and step.accepted:
            self._trial = _Trial(self._options)
        if self._trial is None:
            self._end(time - step.emitted)
        else:
            self._trial.observe(step, asked.limit, step.emitted - time)
        return doubtful

    def _decide(self) -> _Option | None:
        if self._trial is not None:
            if (best := self._trial.best(*self._pace.units)) is not None:
                return best
            self._end(-self._trial.gained)
        factor = 2.0 ** (self._failures - 1)
        purse = _SHARE * self._waited - self._reading * self._unread
        if purse < factor * self._lost:
            return None
        drafting, verifying = self._pace.units
        times = {
            option: drafting * option.draft_s + verifying * option.verify_s
            for options in self._options.values()
            for option in options
        }
        could_pay = [option for option, time in times.items() if option.limit.depth + 1 > time]
        probe = min(could_pay, key=times.__getitem__, default=None)
        return probe if probe is not None and purse >= factor * (times[probe] - 1.0) else None

    def _end(self, loss: float) -> None:
        self._trial = None
        self._failures = self._failures + 1 if loss > 0.0 else 1
        self._lost = loss
        self._waited = 0.0


@dataclass(frozen=True, slots=True)
class _Option:
    """A limit, and the seconds that it costs by what was measured at the start."""

    limit: Limit
    draft_s: float
    verify_s: float


class _Trial:
    """Speculation, as long as it pays.

    Attributes:
        stake: plain steps that it may still lose.
        gained: plain steps, in all.
    """

    def __init__(self, options: Mapping[int, Sequence[_Option]]) -> None:
        self.stake = _STAKE
        self.gained = 0.0
        self._options = options
        self._deepest = _AHEAD
        self._levels = {nodes: _Levels(len(of)) for nodes, of in options.items()}

    def observe(self, step: Step, limit: Limit, gain: float) -> None:
        """Count a step with a draft, and what it gained in plain steps."""
        self.add(gain)
        self._deepest = max(self._deepest, step.accepted + _AHEAD)
        for nodes, levels in self._levels.items():
            # A tree that did not fill its limit is the same with every limit that it fits in.
            same = step.drafted < limit.nodes and step.drafted <= nodes
            levels.observe(step, limit, 1.0 if same else (limit.nodes / nodes) ** _POWER)

    def add(self, gain: float) -> None:
        self.gained += gain
        self.stake = min(self.stake + gain, _MOST_STAKE)

    def best(self, drafting: float, verifying: float) -> _Option | None:
        """The option with the most tokens for its time; None if plain decoding has more.

        Args:
            drafting: plain steps of time that a measured second of drafting takes.
            verifying: the same of verifying.
        """
        cheapest = min(drafting * of[0].draft_s + verifying * of[0].verify_s for of in self._options.values()) - 1.0
        risk = min(max(_RISK * self.stake, cheapest), self.stake)
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
    """The acceptance of proposals by their depth."""

    def __init__(self, most: int) -> None:
        self._accepted = [_PRIOR * _PRIOR_WEIGHT] + [0.0] * (most - 1)
        self._decided = [_PRIOR_WEIGHT] + [0.0] * (most - 1)

    def observe(self, step: Step, limit: Limit, rejections: float) -> None:
        """Count a step, a rejection as so many. Where a draft ends before its limit, nothing is accepted either."""
        rejected = step.accepted < min(limit.depth, step.emitted)
        for level in range(len(self._decided)):
            accepted = float(level < step.accepted)
            decided = accepted + rejections * (rejected and level == step.accepted)
            self._accepted[level] = KEPT * self._accepted[level] + accepted
            self._decided[level] = KEPT * self._decided[level] + decided

    def acceptances(self) -> Iterator[float]:
        """At depth 1, 2, ...: a depth of which little is known is taken to be like the one above."""
        above = self._accepted[0] / self._decided[0]
        for accepted, decided in zip(self._accepted, self._decided, strict=True):
            above = (accepted + _PRIOR_WEIGHT * above) / (decided + _PRIOR_WEIGHT)
            yield above


class _Pace:
    """How steps really go: a factor on all that drafting was measured to take, and one on verifying.

    A Kalman filter (Kalman 1960) of the two, which drift, mostly together. Only whole steps are looked at: what a GPU
    has still to draft is waited for while it verifies, so that no clock on the host tells the two apart. Steps that
    differ in depth do, and plain ones most of all.
    """

    def __init__(self, plain_s: float) -> None:
        self._measured_s = plain_s
        self._factors = [1.0, 1.0]
        self._spread = [[_MISMEASURED**2, 0.0], [0.0, _MISMEASURED**2]]

    @property
    def plain_s(self) -> float:
        """Seconds of a plain step."""
        return self._factors[1] * self._measured_s

    @property
    def doubt(self) -> float:
        """The standard error of that, as a share."""
        return math.sqrt(self._spread[1][1]) / self._factors[1]

    @property
    def units(self) -> tuple[float, float]:
        """Plain steps of time that a measured second of drafting takes, and one of verifying."""
        return self._factors[0] / self.plain_s, self._factors[1] / self.plain_s

    def learn(self, seconds: float, draft_s: float, verify_s: float) -> None:
        """Correct the factors by a step that took some seconds, and was measured to take others."""
        factors, spread = self._factors, self._spread
        for i, j in product((0, 1), repeat=2):
            spread[i][j] += (_DRIFT + _DRIFT_APART * (i == j)) * factors[i] * factors[j]
        expected = factors[0] * draft_s + factors[1] * verify_s
        # Once in a while a machine does something else, and a step takes ten times as long.
        error = min(max(seconds - expected, -expected / 2), expected)
        along = [row[0] * draft_s + row[1] * verify_s for row in spread]
        variance = along[0] * draft_s + along[1] * verify_s + (_NOISE * expected) ** 2
        for i in (0, 1):
            factors[i] = max(factors[i] + along[i] / variance * error, factors[i] / 4)
        for i, j in product((0, 1), repeat=2):
            spread[i][j] -= along[i] * along[j] / variance


def examples() -> dict[str, Callable[[], CostAware]]:
    """What makes controllers, by name."""
    free = Costs({1: 1e-3}, {Limit(1): Draft(1, 0.0), Limit(5): Draft(5, 0.0)})
    dear = Costs({1: 1e-3, 65: 3e-3}, {Limit(1): Draft(1, 2e-4), Limit(5): Draft(5, 1e-3)}, catch_up=1e-6)
    trees = {Limit(d, n): Draft(n, 1e-4 * d) for d in (1, 2, 4) for n in (4, 8)}
    return {
        "cost-aware-free": lambda: CostAware(free, most=5),
        "cost-aware-dear": lambda: CostAware(dear, most=5),
        "cost-aware-trees": lambda: CostAware(Costs({1: 1e-3}, trees)),
    }
