"""A proposer that vLLM loads by `method: custom_class`: prompt lookup that logs each draft.

It runs in vLLM's own Python, which lacks this package. `SPECDECODE_DRAFTS` names the log file. Each of its lines is
JSON: a draft, and the text before it.
"""

from __future__ import annotations

import json
import os
from typing import Any

LONGEST_MATCH = 3


def look_up(text: list[int], length: int) -> list[int]:
    """Return the tokens that followed an earlier match of the last tokens: the longest match, and of these the
    latest.
    """
    for size in range(LONGEST_MATCH, 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + length]
    return []


class Proposer:
    """A proposer that logs its drafts."""

    def __init__(self, config: Any) -> None:
        self._length = config.speculative_config.num_speculative_tokens
        self._file = open(os.environ["SPECDECODE_DRAFTS"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def load_model(self, *_: Any, **__: Any) -> None:
        """Load nothing: vLLM calls this method of every proposer."""

    def propose(self, sampled: list[list[int]], lengths: Any, texts: Any, *_: Any, **__: Any) -> list[list[int]]:
        """Return a draft for each request.

        Args:
            sampled: the tokens of each request's last step; none while its prompt is read.
            lengths: the lengths of the texts.
            texts: token ids, a row for each request.
        """
        drafts: list[list[int]] = []
        for row, new in enumerate(sampled):
            text = [int(token) for token in texts[row][: int(lengths[row])]]
            draft = look_up(text, self._length) if len(new) else []
            if len(new):
                self._file.write(json.dumps({"text": text, "draft": draft}) + "\n")
            drafts.append(draft)
        return drafts
