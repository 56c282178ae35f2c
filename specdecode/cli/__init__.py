"""The command line: `specdecode generate`, `fetch`, `doctor`, `gate`, `history`, `report`, `schema`, `recommend`,
`bless`, `bisect`, `train-head` and `lm-eval`."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from specdecode.cli import bisect, doctor, gate, generate, harness, history, recommend, report, schema, train
from specdecode.cli.output import standard_streams
from specdecode.core.errors import NO_GPU_MEMORY, SpecDecodeError, is_out_of_memory
from specdecode.support.memory_pages import ask_for_large_pages
from specdecode.support.messages import note


class _Commands(TyperGroup):
    """A group of commands that reports an interruption. Typer would end without a message, or with "Aborted!"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("specdecode: interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Exact speculative decoding for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(doctor.fetch)
app.command()(doctor.doctor)
app.command()(gate.gate)
app.command()(history.history)
app.command()(report.report)
app.command()(schema.schema)
app.command()(recommend.recommend)
# --help is passed on, so that the harness lists its own options.
app.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)(harness.lm_eval)
app.command()(gate.bless)
app.command()(bisect.bisect)
app.command()(train.train_head)


def main() -> None:
    """Run the command line. A fault of the input or the output is reported in one sentence, with exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    ask_for_large_pages()
    # transformers imports torchao if it is installed, and torchao logs missing GPU kernels at every start.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with standard_streams():
            app()
    except (SpecDecodeError, ValueError, OSError) as error:
        note(f"specdecode: {error}")
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        note(f"specdecode: {NO_GPU_MEMORY}")
        sys.exit(2)
