"""The content of a draft tree."""

from __future__ import annotations

from specdecode import DraftTree


def paths(tree: DraftTree) -> list[list[int]]:
    """Return the tokens from the root to each node."""
    found: list[list[int]] = [[]]
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append([*found[parent], token])
    return found[1:]
