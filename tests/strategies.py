"""What Hypothesis draws from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from specdecode import DraftTree


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12, tokens: int = 5, min_nodes: int = 0) -> DraftTree:
    """Any tree: parents are arbitrary earlier nodes, and siblings may propose the same token."""
    size = draw(st.integers(min_nodes, max_nodes))
    parents = [draw(st.integers(0, node)) for node in range(size)]
    proposed = [draw(st.integers(0, tokens - 1)) for _ in range(size)]
    return DraftTree(torch.tensor(proposed, dtype=torch.long), torch.tensor(parents, dtype=torch.long))
