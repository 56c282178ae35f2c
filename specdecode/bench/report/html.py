"""A run of speeds as a section of an HTML page. The page needs no script, no font and no network."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict
from specdecode.bench.report.captions import (
    cells,
    command,
    drafts,
    failing_first,
    label,
    models,
    notes,
)
from specdecode.bench.report.elements import (
    Element,
    element,
    explanations,
    grid_table,
    head_cell,
    pair,
    scrolling,
    stacked,
    tile,
    wide_table,
)
from specdecode.bench.report.grid import Grid
from specdecode.bench.report.load import by_concurrency, families, gains, losses, scales
from specdecode.bench.report.speed_charts import (
    acceptance,
    blame_bars,
    course,
    interval,
    load_curves,
    ruler,
    speedup_scale,
    styles,
)
from specdecode.bench.report.svg import Style, card, legend, swatch
from specdecode.bench.report.tables import (
    by_model,
    by_part,
    limits,
    memory,
    past_speedups,
    speeds,
    surroundings,
)
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import UNKNOWN, Estimate

SIGNS = {
    Verdict.REGRESSED: ("bad", "✗"),
    Verdict.MISSING: ("bad", "✗"),
    Verdict.INCONCLUSIVE: ("warn", "?"),
    Verdict.NO_BASELINE: ("warn", "+"),
    Verdict.WRONG_HARDWARE: ("warn", "≠"),
    Verdict.NOT_JUDGED: ("warn", "-"),
    Verdict.IMPROVED: ("good", "▲"),
    Verdict.PASS: ("good", "✓"),
}
"""The colour class of each verdict, and its sign for readers who do not see colours."""


def section(
    run: RunFile,
    title: str,
    judged_by: str,
    judgements: Sequence[Judgement],
    past: History | None = None,
    gate: str = "on",
) -> list[Element]:
    """Return the section of one run.

    Args:
        run, title, judged_by, judgements, past: as for `report.markdown`.
        gate: setting of the gate, a key of `FAILING`: it decides which verdicts fail.
    """
    looks = styles(run)
    return [
        *_heading(run, title, judgements, FAILING[gate]),
        *_verdicts(judged_by, judgements),
        *_speeds(run, looks),
        *_by_concurrency(run, looks),
        *_parts(run),
        *_acceptance(run, looks),
        *_table("What limits the speedup", limits(run), "Speedups as products"),
        *_table("By the model", by_model(run), "Speedups by the model"),
        *_table("Memory", memory(run), "Memory of each arm"),
        *(_history(run, past, looks) if past else []),
        *_about(run),
    ]


def _heading(run: RunFile, title: str, judgements: Sequence[Judgement], failing: Collection[Verdict]) -> list[Element]:
    """Return the title of the run, and tiles with its key results."""
    lead = [title.removeprefix(f"{models(run)}, "), *filter(None, [run.date, run.commit and f"commit {run.commit}"])]
    tiles = [_gate_tile(judgements, failing), _outputs_tile(run)]
    speedups = lossless_speedups(run)
    if best := fastest(speedups):
        tiles.append(
            tile("Fastest lossless", "", f"{speedups[best].value:.2f} times {run.baseline_of(best)}", label(run, best))
        )
    elif speedups:
        tiles.append(tile("Fastest lossless", "", run.header.baseline, "no arm is faster beyond the noise"))
    tiles.append(
        tile(
            "A/A floor",
            "",
            f"{math.expm1(run.header.floor):.1%}",
            f"difference between two {run.header.baseline} runs",
        )
    )
    return [
        element("header", element("h1", models(run)), element("p", " · ".join(lead), class_="lead")),
        element("dl", *tiles, class_="tiles"),
    ]


def lossless_speedups(run: RunFile) -> dict[str, Estimate]:
    """Return the known speedups of the lossless arms with right outputs.

    The run's reference arm is left out, and so are arms that differ from their reference arm only in concurrency.
    """
    speedups = {
        arm: run.speedup(arm)
        for arm, record in run.arms.items()
        if arm != run.header.baseline and not record.faulty and not record.lossy and not scales(run, arm)
    }
    return {arm: speedup for arm, speedup in speedups.items() if math.isfinite(speedup.value)}


def fastest(speedups: Mapping[str, Estimate]) -> str | None:
    """Return the arm with the largest speedup; None if no arm is faster than its reference arm beyond the noise."""
    faster = [arm for arm, speedup in speedups.items() if speedup.low > 1]
    return max(faster, key=lambda arm: speedups[arm].value, default=None)


def _gate_tile(judgements: Sequence[Judgement], failing: Collection[Verdict]) -> Element:
    failed = sum(judgement.verdict in failing for judgement in judgements)
    if not judgements:
        return tile("Verdicts", "warn", "Not judged", "there is no baseline to judge by")
    if failed:
        return tile("Verdicts", "bad", f"✗ {failed} of {len(judgements)} fail", "see below")
    return tile("Verdicts", "good", "✓ None fails", f"of {len(judgements)}")


def _outputs_tile(run: RunFile) -> Element:
    if failed := [arm for arm, record in run.arms.items() if record.failure]:
        return tile("Outputs", "bad", "✗ FAILED", f"{', '.join(failed)} did not decode")
    if wrong := [arm for arm, record in run.arms.items() if record.bugs]:
        return tile("Outputs", "bad", "✗ WRONG", f"of {', '.join(wrong)}: their times are void")
    unchecked = [arm for arm, record in run.arms.items() if record.options.get("lossy")]
    lossy = any(record.lossy for arm, record in run.arms.items() if arm not in unchecked)
    ties = sum(record.ties for record in run.arms.values())
    whose = f"{run.compared_with}'s" + (" (of a lossy arm: plain decoding's with the same loss)" if lossy else "")
    text = f"all tokens equal {whose}{f', except at {ties} ties' if ties else ''}"
    return tile("Outputs", "good", "✓ Right", f"{text}; not checked: {', '.join(unchecked)}" if unchecked else text)


def _verdicts(judged_by: str, judgements: Sequence[Judgement]) -> list[Element]:
    """List verdicts by reason, failing ones first. Passing verdicts are folded away."""
    groups: dict[tuple[Verdict, str], list[Judgement]] = {}
    for judgement in failing_first(judgements):
        groups.setdefault((judgement.verdict, judgement.reason), []).append(judgement)
    blames = [judgement.blame for judgement in judgements if judgement.blame]
    widest = max((abs(share) for blame in blames for share in blame.shares.values()), default=0.0)
    items = {key: _verdict(group, max(widest, math.log(1.05))) for key, group in groups.items()}
    shown = [item for (verdict, _), item in items.items() if verdict is not Verdict.PASS]
    passing = [item for (verdict, _), item in items.items() if verdict is Verdict.PASS]
    parts = [element("h2", "Verdicts"), element("p", judged_by, class_="soft")]
    if blames:
        legend = "Bars: change of the time per token by each part of a step; to the right is slower."
        parts.append(element("p", legend, class_="soft"))
    if shown:
        parts.append(element("ul", *shown, class_="verdicts"))
    if passing:
        count = sum(judgement.verdict is Verdict.PASS for judgement in judgements)
        summary = element("summary", f"{count} {'verdicts pass' if count > 1 else 'verdict passes'}")
        parts.append(element("details", summary, element("ul", *passing, class_="verdicts")))
    return parts


def _verdict(group: Sequence[Judgement], widest: float) -> Element:
    """Return a list item of judgements with the same verdict and reason; `widest` is as for `blame_bars`."""
    first = group[0]
    kind, sign = SIGNS[first.verdict]
    arms, gates = (", ".join(dict.fromkeys(names)) for names in ([j.arm for j in group], [j.gate for j in group]))
    reason = first.reason.removesuffix(f"; {first.blame}").replace("->", "→")
    bars = [blame_bars(judgement.arm, judgement.blame, widest) for judgement in group if judgement.blame]
    return element(
        "li",
        element("span", f"{sign} {first.verdict.value}", class_=f"chip {kind}"),
        element("div", element("h3", f"{arms}: {gates}"), element("p", reason)),
        *([element("div", *bars)] if bars else []),
    )


def _speeds(run: RunFile, looks: Mapping[str, Style]) -> list[Element]:
    """Return the table of speeds, with a chart of the speedups as its second column."""
    grid = speeds(run)
    speedups = {arm: run.speedup(arm) for arm in run.arms}
    predicted = {arm: run.predicted_speedup(arm) for arm in run.arms}
    scale, floor = speedup_scale(run, speedups, predicted), math.exp(run.header.floor)
    heads = [head_cell(column.name, column.figures) for column in grid.columns]
    heads.insert(1, element("th", ruler(scale), class_="plot", scope="col"))
    rows = []
    for arm, (name, *values, output) in zip(run.arms, grid.rows, strict=True):
        chart = interval(f"{arm} over {run.baseline_of(arm)}", speedups[arm], predicted[arm], floor, scale, looks[arm])
        row = [element("th", swatch(looks[arm]), name, scope="row", title=name), element("td", chart, class_="plot")]
        row += [pair(column.name, value) for column, value in zip(grid.columns[1:-1], values, strict=True)]
        kind, sign = ("bad", "✗") if run.arms[arm].faulty else ("good", "✓")
        rows.append(
            element(
                "tr", *row, element("td", element("span", f"{sign}\N{NO-BREAK SPACE}{output}", class_=f"chip {kind}"))
            )
        )
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="speeds")
    legend = (
        f"Speedup over {run.compared_with}: dot and 95 % interval, on a logarithmic scale. The grey band is the A/A"
        f" floor, within which two runs of {run.header.baseline} differ; the vertical stroke is the predicted speedup."
        " Hollow dots are arms of transformers."
    )
    return [element("h2", "Speed"), element("p", legend, class_="soft"), stacked(table), explanations(grid)]


def _by_concurrency(run: RunFile, looks: Mapping[str, Style]) -> list[Element]:
    """Return a table and a chart of speeds by concurrency; nothing if no arms differ only in concurrency."""
    parts = _table("By concurrency", by_concurrency(run), "Speed by concurrency")
    if curves := gains(run):
        arms = families(run)
        styles_ = {name: looks[next(iter(arms[name].values()))] for name in curves}
        parts += [
            element("ul", *(element("li", sentence) for sentence in losses(run)), class_="notes"),
            legend(styles_),
            element("div", card(["Speedup by concurrency"], load_curves(curves, styles_)), class_="cards"),
        ]
    return parts


def _parts(run: RunFile) -> list[Element]:
    """Return a folded table of speeds by task and length; nothing if there is only one task and one length."""
    grid = by_part(run)
    if not grid.rows:
        return []
    summary = element("summary", f"By task and length: {len(grid.rows)} rows")
    return [element("details", summary, wide_table(grid), explanations(grid))]


def _acceptance(run: RunFile, looks: Mapping[str, Style]) -> list[Element]:
    """Return a card for each drafting arm: accepted proposals of a step, and acceptance at each position."""
    drafting = [arm for arm, record in run.arms.items() if drafts(record)]
    if not drafting:
        return []
    histograms = [run.arms[arm].histograms() for arm in drafting]
    longest = max(len(entries) for steps in histograms for entries in (steps.accepted, steps.depth)) - 1
    legend = (
        "Left: share of steps by number of accepted proposals. Right: share of proposals accepted, by position in the"
        " draft. The scales are the same for all arms."
    )
    cards = []
    for arm in drafting:
        length, rate = cells(run, arm, ["mean_acceptance_length", "acceptance_rate"])
        sentence = f"τ {length} tokens a step" + (f", {rate} of proposals accepted" if rate else "")
        steps, drafted = run.arms[arm].counts().steps, sum(run.arms[arm].histograms().accepted)
        if drafted < steps:
            sentence += f"; of {steps:.0f} steps, the {drafted} with a draft are shown"
        chart = acceptance(run, arm, longest, looks[arm])
        cards.append(card([swatch(looks[arm]), label(run, arm)], chart, sentence))
    return [
        element("h2", "Acceptance"),
        element("p", legend, class_="soft"),
        element("div", *cards, class_="cards"),
    ]


def _table(heading: str, grid: Grid, name: str) -> list[Element]:
    """Return a table with its heading, and its columns' explanations; nothing if it has no rows."""
    if not grid.rows:
        return []
    return [element("h2", heading), scrolling(grid_table(grid), name), explanations(grid)]


def _history(run: RunFile, past: History, looks: Mapping[str, Style]) -> list[Element]:
    """Return every arm's speedup in the former baselines and in this run, as charts and a table."""
    parts = [element("h2", "History"), element("p", past.summary, class_="soft")]
    if not past.runs:
        return parts
    runs = past.until(run)
    if len(runs) > 1:
        legend = (
            f"Speedup over {run.compared_with} with 95 % intervals; the last mark is this run. Equal changes are"
            " equally tall in all plots."
        )
        cards = element("div", *_courses(run, runs, looks), class_="cards")
        parts += [element("p", legend, class_="soft"), cards]
    grid = past_speedups(run, past)
    return [*parts, scrolling(grid_table(grid), "Speedups of earlier runs"), explanations(grid)]


def _courses(run: RunFile, runs: Sequence[RunFile], looks: Mapping[str, Style]) -> list[Element]:
    """Return a card for each arm: its speedup in each run with right outputs."""
    speedups = {
        arm: [then.speedup(arm) if arm in then.arms and not then.arms[arm].faulty else UNKNOWN for then in runs]
        for arm in run.arms
    }
    known = {arm: [s for s in of_arm if math.isfinite(s.value)] for arm, of_arm in speedups.items()}
    # All plots span the same ratio, each around its own middle, so equal changes are equally tall.
    spans = (max(s.high for s in of_arm) / min(s.low for s in of_arm) for of_arm in known.values() if of_arm)
    least = math.log(max(spans, default=1.0))
    return [
        card(
            [swatch(looks[arm]), label(run, arm)],
            course(f"{arm} over {run.baseline_of(arm)}", runs, speedups[arm], least, looks[arm]),
        )
        for arm in run.arms
        if known[arm] and arm != run.header.baseline
    ]


def _about(run: RunFile) -> list[Element]:
    """Return the circumstances of the run, and the command that repeats it."""
    tables = [scrolling(grid_table(grid), grid.columns[0].name) for grid in surroundings(run)]
    # Lines end between options, not at the hyphens in them.
    words = [part for word in command(run).split(" ") for part in (element("span", word), " ")]
    return [
        element("h2", "How it was measured"),
        element("ul", *(element("li", note) for note in notes(run)), class_="notes"),
        element("div", *tables, class_="facts"),
        element("p", "To repeat the measurement:", class_="soft"),
        element("pre", element("code", *words)),
    ]
