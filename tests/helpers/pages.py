"""The parsed content of an HTML page, and names that would break a page."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed page: its elements, the texts in them, and each drawing's class by its title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.drawings: dict[str, str] = {}
        self._class = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "svg":
            self._class = dict(attrs).get("class") or ""

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["title"] and "svg" in self.tags and data.strip():
            self.drawings[data] = self._class
        if self.tags and self.tags[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


MOST_LINES = 60
"""Most lines of a comment, whatever the number of arms."""

HOSTILE = ["<script>alert(1)</script>", "a|b`c`*d*[e](f)\\|", "50%_x&#y{}$\\~^", "[0]\nnew line", '"><img onerror=x>']
