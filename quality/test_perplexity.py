"""Perplexity through the decode path: `pytest --quality`."""

import pytest
import torch

from specdecode.evals.data import samples
from specdecode.evals.perplexity import negative_log_likelihoods, perplexity

_DOCUMENTS = 4
_TOKENS = 160


@pytest.fixture(scope="session")
def documents(target):
    return [target.encode(sample.text)[:_TOKENS] for sample in samples("prose", _DOCUMENTS)[0]]


@pytest.mark.parametrize("width", [1, 6])
def test_the_decode_path_gives_the_models_own_perplexity(target, documents, width, quality_rows):
    """A wrong position, mask or slot in decoding changes the likelihood of real text long before it changes a token."""
    losses = [negative_log_likelihoods(target, document, width) for document in documents]
    reference = []
    for document in documents:
        ids = torch.tensor([document], device=target.device)
        with torch.inference_mode():
            logits = target.model(ids, use_cache=False).logits[0, :-1].double()
        reference.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    found, expected = perplexity(losses), perplexity(reference)
    quality_rows.append(f"PPL of prose, full cache, width {width}: {found:.4f} (in one forward: {expected:.4f})")
    assert found == pytest.approx(expected, rel=1e-4)
