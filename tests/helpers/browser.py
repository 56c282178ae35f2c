"""Checks of an HTML page in the browser of this machine, if it has one."""

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
    const all = names => Array.from(root.querySelectorAll(names)), box = part => part.getBoundingClientRect();
    all("details").forEach(folded => folded.open = true);
    document.title = JSON.stringify({scroll: root.scrollWidth, ground: style.backgroundColor, ink: style.color,
        drawings: all("svg").length,
        arm: Math.min(...all("tbody th").map(name => name.clientWidth)),
        small: all(".scroll:has(table)").filter(frame => frame.scrollWidth > frame.clientWidth).length,
        cut: all(".frame").filter(frame => frame.scrollWidth > frame.clientWidth).length,
        blocks: all(".frame tbody tr").filter(row => frames[0].getComputedStyle(row).display == "flex").length,
        places: [...new Set(all(".plot svg").map(chart => Math.round(box(chart).left) + " " + box(chart).width))],
        below: all(".speeds tbody tr").filter(row => box(row.children[1]).top >= box(row.children[0]).bottom).length,
        chip: Math.max(0, ...all(".chip").filter(chip => /equal$/.test(chip.innerText)).map(chip => box(chip).height)),
        lines: new Set(all(".tile").map(tile => box(tile).top)).size});
});"""


def look_at(page: str, scheme: str, width: int, folder: Path) -> dict[str, Any]:
    """Show a page in the browser and measure it.

    Measured are the width with all details unfolded, the number of drawings, the width of the arms' names, and the
    brightness of text and background. Also: the number of wide tables (`cut`) and of small ones (`small`) that scroll
    sideways, the rows of wide tables shown as blocks, the distinct places of the charts of speedups and their ruler,
    the charts below their arm's name, the height of the chip "equal", and the lines of tiles.

    Args:
        page: the HTML text.
        scheme: "light" or "dark".
        width: in pixels.
        folder: the folder to write into.
    """
    outer = folder / "outer.html"
    # A window has a minimum width and a frame has none. A frame takes its colour scheme from the enclosing element.
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
