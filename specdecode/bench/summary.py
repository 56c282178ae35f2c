"""Results at the end of a suite's session: tables for the terminal, and a comment for a merge request."""

from __future__ import annotations

from rich.console import Console

from specdecode.bench.measure.speed_session import JudgedRun
from specdecode.bench.quality import quality_tables
from specdecode.bench.quality.quality_session import JudgedQualityRun
from specdecode.bench.report.comment import comment
from specdecode.bench.report.grid import rich_table
from specdecode.bench.report.tables import load_table, speed_table, verdicts
from specdecode.bench.report.terminal import console_text
from specdecode.support.files import write_whole


def speed_text(judged: JudgedRun, colours: bool, encoding: str) -> str:
    """Return the tables of speeds and verdicts, as text for a terminal with an encoding."""

    def show(console: Console) -> None:
        console.print(judged.title, highlight=False, soft_wrap=True, markup=False)
        console.print(speed_table(judged.run))
        if loads := load_table(judged.run):
            console.print(loads)
        console.print(f"Prompts from {'; '.join(judged.origins)}.", highlight=False, markup=False)
        console.print(judged.judged_by, highlight=False, soft_wrap=True, markup=False)
        if judged.judgements:
            console.print(rich_table(verdicts(judged.judgements)))

    return console_text(show, colours, encoding)


def speed_comment(judged: JudgedRun, gate: str, file: str) -> str:
    """Return the verdicts and the speeds in a few lines of Markdown.

    Args:
        judged: the judged run.
        gate: setting of the gate, which decides which verdicts fail.
        file: path of the run's file; "" if there is none.
    """
    return comment(judged.run, judged.title, judged.judged_by, judged.judgements, gate, file)


def quality_text(judged: JudgedQualityRun, colours: bool, encoding: str) -> str:
    """Draw the figures into a folder. Return the tables of the arms' costs, as text for a terminal with an encoding."""
    run = judged.run
    margins = f"the margins are from {judged.margins_path}"
    if not judged.margins_path.exists():
        margins = f"there are no margins, as {judged.margins_path} does not exist: nothing was judged"
    where = f"The run is in {judged.file}, its page in the .md file beside it; {margins}. {_draw_figures(judged)}"

    def show(console: Console) -> None:
        console.print(rich_table(quality_tables.costs(run, judged.checks)))
        if run.needles:
            console.print(rich_table(quality_tables.retrieval(run)))
        if run.answers:
            console.print(rich_table(quality_tables.scores(run, judged.checks)))
        for note in [*quality_tables.notes(run), where]:
            console.print(note, highlight=False, soft_wrap=True, markup=False)

    return console_text(show, colours, encoding)


def quality_comment(judged: JudgedQualityRun) -> str:
    """Write the arms' costs as Markdown beside the run's file. Return them in a few lines."""
    write_whole(judged.file.with_suffix(".md"), quality_tables.markdown(judged.run, judged.checks))
    return quality_tables.comment(judged.run, judged.checks, str(judged.file))


def _draw_figures(judged: JudgedQualityRun) -> str:
    """Draw the figures of a run. Return a sentence that names their folder, or the reason why there are none."""
    folder = judged.file.with_suffix("")
    try:
        from specdecode.bench.quality.quality_figures import write
    except ImportError as error:
        return f"There are no figures: they need matplotlib ({error}), pip install 'specdecode[figures]'."
    try:
        drawn = [name for name, reason in write(judged.run, folder).items() if not reason]
    except ValueError as error:
        return f"There are no figures: {error}."
    return f"Figures are in {folder}: {', '.join(drawn)}."
