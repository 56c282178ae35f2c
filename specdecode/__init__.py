"""Speculative decoding for Hugging Face models: exact, measured, and gated in CI.

Each public name is imported at its first use. So the command line's help and the pytest plugin do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdecode.controllers.adaptive import AdaptiveK as AdaptiveK
    from specdecode.controllers.base import FixedK as FixedK
    from specdecode.controllers.cost_aware import CostAware as CostAware
    from specdecode.controllers.cost_aware import Costs as Costs
    from specdecode.core.errors import SpecDecodeError as SpecDecodeError
    from specdecode.core.errors import TokenizerMismatchError as TokenizerMismatchError
    from specdecode.core.errors import UnsupportedModelError as UnsupportedModelError
    from specdecode.core.result import Generation as Generation
    from specdecode.core.result import Step as Step
    from specdecode.core.sampling import Sampling as Sampling
    from specdecode.core.tree import DraftTree as DraftTree
    from specdecode.decoding.generate import generate as generate
    from specdecode.decoding.generate import generate_batch as generate_batch
    from specdecode.decoding.measure_costs import measure_costs as measure_costs
    from specdecode.decoding.specdecoder import SpecDecoder as SpecDecoder
    from specdecode.drafters.cascade import Cascade as Cascade
    from specdecode.drafters.head import HeadDrafter as HeadDrafter
    from specdecode.drafters.lookup import PromptLookup as PromptLookup
    from specdecode.drafters.medusa import MedusaDrafter as MedusaDrafter
    from specdecode.drafters.medusa import load_medusa as load_medusa
    from specdecode.drafters.model import ModelDrafter as ModelDrafter
    from specdecode.drafters.none import NoDraft as NoDraft
    from specdecode.drafters.replay import ReplayDrafter as ReplayDrafter
    from specdecode.drafters.self_streaming import SelfStreamingDrafter as SelfStreamingDrafter
    from specdecode.drafters.tree_shapes import BestFirstTree as BestFirstTree
    from specdecode.drafters.tree_shapes import Chain as Chain
    from specdecode.drafters.tree_shapes import StaticTree as StaticTree
    from specdecode.drafters.universal import UniversalDrafter as UniversalDrafter
    from specdecode.heads.loading import load_head as load_head
    from specdecode.heads.loading import load_mtp as load_mtp
    from specdecode.models.lm import LM as LM
    from specdecode.models.loading import load as load
    from specdecode.policies.heavy_hitter import HeavyHitter as HeavyHitter
    from specdecode.policies.keep_all import KeepAll as KeepAll
    from specdecode.policies.key_norm import KeyNorm as KeyNorm
    from specdecode.policies.sink_window import SinkWindow as SinkWindow

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveK": "controllers.adaptive",
    "BestFirstTree": "drafters.tree_shapes",
    "Cascade": "drafters.cascade",
    "Chain": "drafters.tree_shapes",
    "CostAware": "controllers.cost_aware",
    "Costs": "controllers.cost_aware",
    "DraftTree": "core.tree",
    "FixedK": "controllers.base",
    "Generation": "core.result",
    "HeadDrafter": "drafters.head",
    "HeavyHitter": "policies.heavy_hitter",
    "KeepAll": "policies.keep_all",
    "KeyNorm": "policies.key_norm",
    "LM": "models.lm",
    "MedusaDrafter": "drafters.medusa",
    "ModelDrafter": "drafters.model",
    "NoDraft": "drafters.none",
    "PromptLookup": "drafters.lookup",
    "ReplayDrafter": "drafters.replay",
    "Sampling": "core.sampling",
    "SelfStreamingDrafter": "drafters.self_streaming",
    "SinkWindow": "policies.sink_window",
    "SpecDecodeError": "core.errors",
    "SpecDecoder": "decoding.specdecoder",
    "StaticTree": "drafters.tree_shapes",
    "Step": "core.result",
    "TokenizerMismatchError": "core.errors",
    "UniversalDrafter": "drafters.universal",
    "UnsupportedModelError": "core.errors",
    "generate": "decoding.generate",
    "generate_batch": "decoding.generate",
    "load": "models.loading",
    "load_head": "heads.loading",
    "load_medusa": "drafters.medusa",
    "load_mtp": "heads.loading",
    "measure_costs": "decoding.measure_costs",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
