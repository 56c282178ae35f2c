"""Speculative decoding for Hugging Face models: exact, measured, and gated in CI.

import specdecode
target = specdecode.load("smollm2-135m")
result = specdecode.generate(target, prompt_token_ids, drafter=specdecode.PromptLookup())
"""

from specdecode.controller import FixedK
from specdecode.decode import generate
from specdecode.drafters.lookup import PromptLookup
from specdecode.drafters.model import ModelDrafter
from specdecode.drafters.none import NoDraft
from specdecode.drafters.replay import ReplayDrafter
from specdecode.drafters.shapes import BestFirstTree, Chain, StaticTree
from specdecode.errors import SpecDecodeError, TokenizerMismatchError, UnsupportedModelError
from specdecode.lm import LM
from specdecode.load import load
from specdecode.policies.keep_all import KeepAll
from specdecode.result import Generation, Step
from specdecode.sampling import Sampling
from specdecode.tree import DraftTree

__version__ = "0.1.0"

__all__ = [
    "LM",
    "BestFirstTree",
    "Chain",
    "DraftTree",
    "FixedK",
    "Generation",
    "KeepAll",
    "ModelDrafter",
    "NoDraft",
    "PromptLookup",
    "ReplayDrafter",
    "Sampling",
    "SpecDecodeError",
    "StaticTree",
    "Step",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "generate",
    "load",
]
