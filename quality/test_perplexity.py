"""Perplexity through the decode path: `pytest --quality`."""

from functools import partial

import pytest
import torch

from specdecode.controllers.base import FixedK
from specdecode.drafters.none import NoDraft
from specdecode.evals.data import samples
from specdecode.evals.perplexity import DecodePath, OracleDrafter, negative_log_likelihoods, perplexity
from specdecode.support.progress import progress

_DOCUMENTS = 4
_TOKENS = 160
_WAYS = {1: lambda text: NoDraft(), 6: partial(OracleDrafter, branches=2)}


@pytest.fixture(scope="session")
def documents(target):
    return [target.encode(sample.text)[:_TOKENS] for sample in samples("prose", _DOCUMENTS)[0]]


@pytest.mark.parametrize("width", list(_WAYS))
def test_the_decode_path_gives_the_models_own_perplexity(target, documents, width, quality_rows, capfd):
    """Guards against a wrong position, mask or slot: it changes a text's likelihood long before it changes a token."""
    path = DecodePath(target, drafter=_WAYS[width], controller=partial(FixedK, 5))
    losses, reference = [], []
    with capfd.disabled(), progress("texts") as tell:
        for number, document in enumerate(documents):
            tell(number, len(documents), f"check of the decode path, in steps of {width}")
            losses.append(negative_log_likelihoods(path, document))
    for document in documents:
        ids = torch.tensor([document], device=target.device)
        with torch.inference_mode():
            logits = target.model(ids, use_cache=False).logits[0, :-1].double()
        reference.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    measured, expected = perplexity(losses), perplexity(reference)
    quality_rows.append(
        f"Check of the decode path: PPL of prose, {len(documents)} texts of {_TOKENS} tokens, full cache, is"
        f" {measured:.4f} in steps of {width}, and {expected:.4f} in one forward."
    )
    assert measured == pytest.approx(expected, rel=1e-4)
