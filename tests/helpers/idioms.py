"""A search for idioms that readers stumble over. `python tests/helpers/idioms.py` lists them, and fails if there are
any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

INSTEAD = {
    r"\b(goes|go|going) by\b": "use, follow, depend on",
    r"\bat hand\b": "available, here",
    r"\bin the mean\b": "on average",
    r"\b(became|becomes|came) of\b": "say what happened",
    r"\bby way of\b": "by, through",
    r"\bin truth\b": "really; or leave it out",
    r"\bmakes? of an?\b": "turn into",
}
"""The replacement of each idiom. The key is a regular expression."""


def found(text: str) -> list[tuple[int, str, str]]:
    """Return the line, the idiom and its replacement, for each idiom of a text. An idiom may stretch over two lines."""
    places = []
    for idiom, instead in INSTEAD.items():
        for match in re.finditer(idiom.replace(" ", r"[\s#]+"), text):
            places.append(
                (text.count("\n", 0, match.start()) + 1, " ".join(match[0].replace("#", " ").split()), instead)
            )
    return sorted(places)


def main() -> int:
    """Print the idioms in the package, the documentation and the suites. Return 1 if there are any, else 0."""
    files = [*ROOT.glob("*.md")]
    for folder, ending in (("specdecode", "py"), ("docs", "md"), ("examples", "md"), ("perf", "py"), ("quality", "py")):
        files += (ROOT / folder).rglob(f"*.{ending}")
    count = 0
    for file in sorted(files):
        for line, idiom, instead in found(file.read_text(encoding="utf-8")):
            sys.stderr.write(f"{file.relative_to(ROOT)}:{line}: {idiom!r}: {instead}\n")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
