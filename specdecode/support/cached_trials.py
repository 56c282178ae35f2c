"""Trials on this machine, whose results later processes use again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress

import torch

from specdecode.support.environment import hardware
from specdecode.support.files import cache_folder, write_whole


def tried(what: str, choices: Collection[str], trial: Callable[[], str]) -> str:
    """Return the result of a trial. Make it only if the cache folder has no result for this processor, its number of
    threads and this version of PyTorch.

    Args:
        what: all else that the result depends on.
        choices: the possible results.
        trial: makes the trial.
    """
    key = f"{what} on {hardware(torch.device('cpu'))}, torch {torch.__version__}"
    results = {}
    with suppress(ImportError, OSError, TypeError, ValueError):  # no file, or not one of ours
        results = dict(json.loads((cache_folder() / "trials.json").read_text()))
    if results.get(key) not in choices:
        results[key] = trial()
        with suppress(ImportError, ValueError):  # a result that cannot be kept is found again the next time
            write_whole(cache_folder() / "trials.json", json.dumps(results, indent=1) + "\n")
    return str(results[key])
