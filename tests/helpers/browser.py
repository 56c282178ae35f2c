"""Look at a page with the browser of this machine, if it has one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_MEASURE = """addEventListener("load", () => {
    const root = frames[0].document.documentElement, style = frames[0].getComputedStyle(frames[0].document.body);
    document.title = JSON.stringify({scroll: root.scrollWidth, ground: style.backgroundColor, ink: style.color,
        drawings: root.querySelectorAll("svg").length,
        arm: Math.min(...Array.from(root.querySelectorAll("tbody th"), name => name.clientWidth))});
});"""


def look_at(page: str, scheme: str, width: int, folder: Path) -> dict[str, Any]:
    """Show a page, and measure it: its width and its drawings, the width of arms' names, and how bright it is.

    Args:
        page: as HTML.
        scheme: "light" or "dark".
        width: in pixels.
        folder: to write into.
    """
    outer = folder / "outer.html"
    # Windows have a least width; frames do not, and take their colour scheme from the element that holds them.
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe style="width: {width}px; border: 0; color-scheme: {scheme}"'
        f' srcdoc="{html.escape(page)}"></iframe><script>{_MEASURE}</script>'
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([*command, profile, outer.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(title[1]))
    return seen | {name: sum(map(int, re.findall(r"\d+", seen[name])[:3])) for name in ("ground", "ink")}
