"""A run of the quality suite in tables and in plots, from its file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdecode.bench.report import Column, Grid, markdown_table
from specdecode.evals.results import JUDGED, MEASURES, REFERENCE, Judgement, QualityRun
from specdecode.evals.stats import detectable, mcnemar, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def costs(run: QualityRun, judgements: Sequence[Judgement]) -> Grid:
    """One row an arm: perplexity, what it costs with 95 % intervals, and the verdicts; the reference first."""
    figures = ["PPL", "tokens", *MEASURES.values(), "KL p99", "KL max", "top-1"]
    columns = [Column("arm", False), *map(Column, figures), Column("verdict", False, breaks=True)]
    rows = [["reference", f"{run.perplexity():.3f}", *[""] * len(figures)]]
    for arm in run.judged_arms:
        of = [run.cost(arm, measure) for measure in MEASURES]
        shown = [
            *(f"{cost:.4f}" if cost else "" for cost in of),
            *(_figure(run.divergence(arm, share), ".4f") for share in (0.99, 1.0)),
            _figure(run.agreement(arm), ".1%"),
        ]
        said = [each for each in judgements if each.arm == arm and each.measure in MEASURES]
        verdicts = [f"{MEASURES[each.measure]} {each.verdict.value}" for each in said if each.verdict]
        if "control" in run.arms[arm]:
            verdicts.append(f"(control of {run.arms[arm]['control']}: has to fail)")
        rows.append([arm, f"{run.perplexity(arm):.3f}", str(run.tokens(arm)), *shown, " ".join(verdicts)])
    return Grid(columns, rows)


def retrieval(run: QualityRun) -> Grid:
    """One row an arm and a length: at each depth the share of needles that are found, and the answer's log p."""
    depths = sorted({each.depth for each in run.needles})
    columns = [Column("needle found by", False), Column("tokens"), *(Column(f"depth {depth:g}") for depth in depths)]
    rows = []
    for arm in dict.fromkeys(each.arm for each in run.needles):
        grid = run.grid(arm)
        for length in sorted({length for length, _ in grid}):
            cells = [grid.get((length, depth), []) for depth in depths]
            shown = [
                f"{sum(each.exact for each in cell)}/{len(cell)} ({sum(e.logprob for e in cell) / len(cell):.1f})"
                if cell
                else ""
                for cell in cells
            ]
            rows.append([arm, str(length), *shown])
    return Grid(columns, rows)


def scores(run: QualityRun, judgements: Sequence[Judgement]) -> Grid:
    """One row a task and an arm: the share of problems that it solves with its 95 % interval, which of them otherwise
    than the reference, how likely flips so uneven are by chance, how much that costs, and the verdict."""
    heads = ("solved", "share", "lost", "won", "McNemar p", "loss", "detectable")
    columns = [Column("task", False), Column("arm", False), *map(Column, heads), Column("verdict", False)]
    rows = []
    for task, arm in dict.fromkeys((each.task, each.arm) for each in run.answers):
        if (score := run.score(arm, task)) is None:
            continue
        row = [JUDGED[task], arm, f"{score.passed}/{score.count}", f"{wilson(score.passed, score.count):.0%}"]
        loss = None if arm == REFERENCE else run.cost(arm, task)
        if loss is None:
            rows.append(row + [""] * (len(columns) - len(row)))
            continue
        verdicts = [j.verdict.value for j in judgements if (j.arm, j.measure) == (arm, task) and j.verdict]
        flips = [str(score.lost), str(score.won), f"{mcnemar(score.lost, score.won):.2g}"]
        rows.append([*row, *flips, f"{loss:.0%}", f"{detectable(loss):.0%}", *(verdicts or [""])])
    return Grid(columns, rows)


def notes(run: QualityRun) -> list[str]:
    """What the tables do not say by themselves."""
    header = run.header
    read = "as a whole" if header["window"] is None else f"in windows of {header['window']} tokens"
    stride = "" if header["stride"] is None else f", {header['stride']} tokens apart"
    said = [
        f"{header['target']} in {header['dtype']}, backend {header['backend']}, on {'; '.join(header['origins'])}:"
        f" {len(run.documents)} documents ({header['texts']}), each read {read}{stride} and with an empty cache,"
        f" teacher-forced in steps of {header['k'] + 1} tokens through the decode path.",
        "The reference is the full cache with the weights as they are. ΔNLL and KL(reference || arm) are in nats a"
        " token, with 95 % intervals over documents. Of a cache policy they, p99, max and top-1 agreement are of the"
        " tokens behind the first eviction, whose number stands beside.",
    ]
    if run.needles:
        said.append("A needle is found if greedy decoding writes the number; in brackets the log-probability of it.")
    tasks: Any = header.get("tasks")
    if tasks is not None:
        said += [f"{JUDGED[task]} was not asked: {reason}." for task, reason in tasks["missing"].items()]
    if run.answers:
        said.append(
            f"Problems ({'; '.join(tasks['origins'])}) are answered greedily, in {tasks['max_new_tokens']} tokens at"
            " most: GSM8K by the last number, HumanEval by a function that passes its tests. Lost and won are problems"
            " that only the reference solves, or only the arm; the loss is the share by which fewer are solved, and"
            " detectable the least one that so many problems could have told from none."
        )
    if header["synthetic"]:
        said.append("The weights are random: this is a rehearsal, and says nothing of quality.")
    return said


def markdown(run: QualityRun, judgements: Sequence[Judgement]) -> str:
    """The tables as a page, verdicts that are not as expected first."""
    header = run.header
    parts = [f"## Quality of {header['target']} in {header['dtype']}, preset {header['preset']}"]
    if wrong := [each for each in judgements if each.verdict not in (None, each.expected)]:
        parts.append("\n".join(f"- **{each.arm}** is {_verdict(each)}: {each.reason}" for each in wrong))
    parts.append(markdown_table(costs(run, judgements)))
    if run.needles:
        parts.append(markdown_table(retrieval(run)))
    if run.answers:
        parts.append(markdown_table(scores(run, judgements)))
    parts.append("\n".join(f"- {note}" for note in notes(run)))
    reasons = [[each.arm, JUDGED[each.measure], _verdict(each), each.reason] for each in judgements]
    columns = [*(Column(name, False) for name in ("arm", "of", "verdict")), Column("why", False, breaks=True)]
    parts += ["### Margins", markdown_table(Grid(columns, reasons))]
    return "\n\n".join(parts) + "\n"


def plots(run: QualityRun, folder: Path) -> list[Path]:
    """Perplexity against cache size; KL over position and over the distance since the last eviction, and top-1
    agreement over position; and the needles.

    Returns:
        The pictures that were drawn; none of what the run does not have.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}): pip install 'specdecode[quality]'") from error

    def drawn(name: str, columns: int = 1) -> tuple[Figure, list[Axes], Path]:
        figure = Figure(figsize=(4.5 * columns + 2, 4), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(1, columns, squeeze=False)[0]), folder / f"{name}.png"

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    sizes: dict[str, list[tuple[int, float]]] = {}
    for arm, entry in run.arms.items():
        if "policy" in entry and arm in run.judged_arms:
            family = arm.removesuffix(f"-{entry.get('cache')}")
            sizes.setdefault(family, []).append((entry.get("cache", 0), run.perplexity(arm)))
    if sizes:
        figure, (axes,), file = drawn("ppl-by-cache")
        for family, points in sizes.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=family)
        axes.axhline(run.perplexity(), color="black", linestyle=":", label="full cache")
        axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="PPL")
        ticks = sorted({size for points in sizes.values() for size, _ in points})
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.legend(fontsize="small")
        figure.savefig(file)
        written.append(file)
    if run.documents:
        colours = dict(zip(run.judged_arms, cycle(colormaps["tab20"](range(20))), strict=False))
        figure, panels, file = drawn("divergence", len(_CURVES))
        for axes, (of, along, name, where) in zip(panels, _CURVES, strict=True):
            for arm in run.judged_arms:
                if curve := run.curve(arm, of, along):
                    axes.plot(*zip(*curve, strict=True), label=arm, color=colours[arm])
            axes.set(xlabel=where, ylabel=name)
            if of == "kl":
                axes.set_yscale("symlog", linthresh=1e-4)
                axes.set_ylim(bottom=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
        figure.savefig(file)
        written.append(file)
    if seekers := list(dict.fromkeys(each.arm for each in run.needles)):
        figure, all_axes, file = drawn("needles", len(seekers))
        for axes, arm in zip(all_axes, seekers, strict=True):
            _heat(axes, run, arm)
        figure.savefig(file)
        written.append(file)
    return written


_CURVES = (
    ("kl", "position", "KL, nats a token", "position in the document, tokens"),
    ("kl", "since", "KL, nats a token", "tokens read since the last eviction"),
    ("agrees", "position", "top-1 agreement", "position in the document, tokens"),
)


def _heat(axes: Axes, run: QualityRun, arm: str) -> None:
    """Depth down, length across: the probability of the answer, a token, and whether it is found."""
    grid = run.grid(arm)
    lengths, depths = sorted({length for length, _ in grid}), sorted({depth for _, depth in grid})
    tiles: list[list[float]] = []
    for depth in depths:
        tiles.append([])
        for length in lengths:
            cell = grid.get((length, depth), [])
            told = [math.exp(each.logprob / len(each.ranks)) for each in cell]
            tiles[-1].append(sum(told) / len(told) if told else math.nan)
            found = sum(each.exact for each in cell)
            at = (len(tiles[-1]) - 1, len(tiles) - 1)
            axes.text(*at, f"{found}/{len(cell)}", ha="center", va="center", color="white")
    axes.imshow(tiles, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(title=arm, xlabel="tokens", ylabel="depth")


def _verdict(judgement: Judgement) -> str:
    if judgement.verdict is None:
        return "not judged"
    return judgement.verdict.value + (", as it has to" if judgement.verdict is judgement.expected != "PASS" else "")


def _figure(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)
