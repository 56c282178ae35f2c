"""The parts of an arm that need models: the drafter and the controller."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from specdecode.bench.arms.entry import ArmSpec
from specdecode.controllers.adaptive import AdaptiveK
from specdecode.controllers.base import Controller
from specdecode.controllers.cost_aware import CostAware
from specdecode.decoding.measure_costs import measure_costs
from specdecode.drafters.base import Drafter
from specdecode.drafters.cascade import Cascade
from specdecode.drafters.head import HeadDrafter
from specdecode.drafters.medusa import MedusaDrafter, MedusaHeads, load_medusa
from specdecode.drafters.model import ModelDrafter
from specdecode.drafters.none import NoDraft
from specdecode.drafters.self_streaming import SelfStreamingDrafter
from specdecode.drafters.universal import UniversalDrafter
from specdecode.heads.bound import BoundHead, untrained
from specdecode.heads.loading import load_head, load_mtp
from specdecode.models.lm import LM

# Number of Medusa heads for a target of random weights.
_MEDUSA_HEADS = 4


def drafter_maker(spec: ArmSpec, target: LM, draft: LM | None = None) -> Callable[[], Drafter]:
    """Return a function that builds an arm's drafter. Each text gets a new drafter, which shares the models and heads.

    Args:
        spec: the arm's entry.
        target: the model that the arm decodes with. A target of random weights gets a head of random weights.
        draft: the draft model, for an arm that needs one.

    Raises:
        ModelFileError: a head is missing or damaged.
        UnsupportedModelError: a head belongs to another target, or the architecture does not support the drafter.
        TokenizerMismatchError: the tokenizers of draft and target do not allow drafting by text.
    """
    makers = [_maker(kind, spec, target, draft) for kind in spec.drafters]

    def make_drafter() -> Drafter:
        drafters = [make() for make in makers]
        return drafters[0] if len(drafters) == 1 else Cascade(*drafters)

    make_drafter()  # raises errors about these models now, and not in the middle of a run
    return make_drafter


def _maker(kind: str, spec: ArmSpec, target: LM, draft: LM | None) -> Callable[[], Drafter]:
    if kind == "lookup":
        return spec.prompt_lookup
    if kind == "head":
        name = spec.head or target.name
        head = BoundHead(untrained(target), target) if target.synthetic else load_head(name, target)
        return partial(HeadDrafter, head, spec.tree_shape())
    if kind == "mtp":
        return partial(HeadDrafter, load_mtp(target), spec.tree_shape())
    if kind == "medusa":
        heads = MedusaHeads(target, _MEDUSA_HEADS, 1) if target.synthetic else load_medusa(str(spec.head), target)
        return partial(MedusaDrafter, heads, spec.tree_shape())
    if kind == "self-streaming":
        return partial(SelfStreamingDrafter, target, shape=spec.tree_shape(), **spec.self_streaming_arguments)
    if kind == "none":
        return NoDraft
    assert draft is not None
    if kind == "model":
        return partial(ModelDrafter, draft, spec.tree_shape())
    return partial(UniversalDrafter, target, draft)


def controller_maker(spec: ArmSpec, target: LM, make_drafter: Callable[[], Drafter]) -> Callable[[], Controller]:
    """Return a function that builds an arm's controller, a new one for each text. Measure the costs if it needs any."""
    if spec.controller == "adaptive":
        return AdaptiveK
    if spec.controller == "cost-aware":
        return partial(CostAware, measure_costs(target, make_drafter()))
    return spec.fixed_k
