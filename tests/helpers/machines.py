"""Simulated machines with set times and texts with set acceptance: no model, no clock."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from specdecode import Costs, Step
from specdecode.controllers.base import Controller, Limit
from specdecode.controllers.cost_aware import DraftCost

AcceptanceModel = Callable[[int, int, float], float]
"""The probability that a proposal is right, from its place in the text, its depth in the draft (from 0), and the number
of nodes at that depth of the tree.
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """The costs of a step. The unit is a target forward over one row.

    Attributes:
        row: each further row of the target's forward.
        draft: each level of the draft.
        asking: each proposal of any depth, an empty one included.
        reading: each token that the draft catches up with.
        tree: proposals fill all allowed nodes, instead of being chains.
        depth: the largest depth of a proposal.
        queued: the host's clock counts drafting as part of verifying, as on a GPU.
        noise: the largest relative error of a time, up or down.
    """

    row: float
    draft: float
    asking: float = 0.0
    reading: float = 0.0
    tree: bool = False
    depth: int = 64
    queued: bool = False
    noise: float = 0.05

    def nodes(self, limit: Limit) -> int:
        depth = min(limit.depth, self.depth)
        return max(limit.nodes, depth) if self.tree else min(depth, limit.nodes)

    def draft_s(self, limit: Limit) -> float:
        nodes = self.nodes(limit)
        return self.asking + self.draft * min(limit.depth, self.depth) * (1 + 0.02 * nodes if self.tree else 1)

    def verify_s(self, rows: int) -> float:
        return 1 + self.row * (rows - 1)

    def costs(self, draft: float = 1.0, verify: float = 1.0) -> Costs:
        """Return the costs as measured, or mismeasured by these factors."""
        limits = [
            Limit(depth, nodes) for depth in (1, 2, 4, 8, 16) for nodes in ((4, 12, 32, 64) if self.tree else (64,))
        ]
        return Costs(
            verify={rows: verify * self.verify_s(rows) for rows in (1, 2, 4, 8, 16, 32, 65)},
            draft={limit: DraftCost(self.nodes(limit), draft * self.draft_s(limit)) for limit in limits},
            catch_up=draft * self.reading,
        )


class Plain:
    """A controller that never asks for a draft."""

    def limit(self) -> Limit:
        return Limit(0)

    def observe(self, step: Step) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded text: its seconds without the target's prefill, and its steps with the limits asked for."""

    seconds: float
    steps: list[Step]
    limits: list[Limit]

    def drafted(self, start: int = 0, end: int | None = None) -> int:
        """Count the steps with a draft among the steps that begin between two places of the text."""
        place, found = 0, 0
        for step in self.steps:
            found += bool(step.drafted) and start <= place and (end is None or place < end)
            place += step.emitted
        return found


def decode(
    machine: Machine,
    controller: Controller,
    acceptance: AcceptanceModel,
    tokens: int,
    seed: int,
    proposes: float = 1.0,
    pace: Callable[[float], float] = lambda now: 1.0,
    prompt: int = 64,
) -> Decoded:
    """Decode so many tokens after a prompt, as `specdecode.generate` would.

    Whether a proposed token is right depends only on the seed and its place, so that all controllers have the same
    luck.

    Args:
        machine: the costs.
        controller: sets the draft length.
        acceptance: the quality of the draft.
        tokens: the number of tokens to decode.
        seed: of all chance.
        proposes: the probability that there is a proposal at all.
        pace: the slowdown of the machine at a time, as a factor.
        prompt: the number of prompt tokens, which the draft has to read.
    """
    luck, found, noise = _coins(seed), _coins(seed + 1_000_000), random.Random(seed)
    decoded = Decoded(0.0, [], [])
    done, unread, now = 0, prompt, 0.0

    def seconds(cost: float) -> float:
        return cost * pace(now) * noise.uniform(1 - machine.noise, 1 + machine.noise)

    while done < tokens:
        limit = controller.limit()
        clipped = Limit(min(limit.depth, tokens - done - 1), limit.nodes)
        drafted = depth = accepted = 0
        cost = 0.0
        if clipped.depth > 0:
            cost, unread = machine.reading * unread + machine.asking, 0
            if found[done] < proposes:
                drafted, depth = machine.nodes(clipped), min(clipped.depth, machine.depth)
                cost += machine.draft_s(clipped) - machine.asking
                while accepted < depth and luck[done + accepted] < acceptance(
                    done + accepted, accepted, drafted / depth
                ):
                    accepted += 1
        draft_s, verify_s = seconds(cost), seconds(machine.verify_s(1 + drafted))
        queued = draft_s if machine.queued and drafted else 0.0
        reading = 0.0 if decoded.steps else machine.row * (prompt - 1)
        step = Step(
            drafted=drafted,
            depth=depth,
            rows=1 + drafted if decoded.steps else prompt + drafted,
            accepted=accepted,
            emitted=accepted + 1,
            draft_forwards=0,
            draft_s=draft_s - queued,
            verify_s=verify_s + queued + reading,
            total_s=draft_s + verify_s + reading,
        )
        controller.observe(step)
        decoded.steps.append(step)
        decoded.limits.append(limit)
        now += draft_s + verify_s
        done += step.emitted
        if clipped.depth <= 0:
            unread += step.emitted
    return Decoded(now, decoded.steps, decoded.limits)


@functools.cache
def _coins(seed: int) -> list[float]:
    chance = random.Random(seed)
    return [chance.random() for _ in range(4096)]
