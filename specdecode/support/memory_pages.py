"""Large memory pages for weights, so that processes of equal code are equally fast."""

from __future__ import annotations

import os

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable of PyTorch: with "1" it asks Linux for pages of 2 MiB for large tensors."""


def ask_for_large_pages() -> None:
    """Let PyTorch ask for large memory pages in this process and in those that it starts, unless the user decided.

    The places of small pages (4 KiB) in memory differ by chance. So one of two processes with equal code may be faster
    for its whole life. Call this before the first tensor exists: PyTorch reads the variable once.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
