"""Drafters whose draft models are built and probed once, however many tests draft with them."""

from __future__ import annotations

import functools

import pytest

from specdecode import LM
from specdecode.drafters.base import Drafter
from tests.helpers.discovery import examples

_subset = functools.cache(LM.subset)


def part(target: LM, *layers: int) -> LM:
    """Return the model of some layers of a target, the same one at every call."""
    return _subset(target, layers)


def new_examples(file: str, target: LM) -> dict[str, Drafter]:
    """Return `examples(file, target)`: new drafters, with the draft models of earlier calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LM, "subset", lambda self, layers: part(self, *layers))
        return examples(file, target)


def example_in_turn(file: str, target: LM, turn: int) -> Drafter:
    """Return one of the new examples of a drafter's file. Turns begin anew behind the last of them."""
    examples_of_file = list(new_examples(file, target).values())
    return examples_of_file[turn % len(examples_of_file)]
