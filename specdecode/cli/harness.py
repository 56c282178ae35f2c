"""`specdecode lm-eval`: run tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

import typer


def lm_eval(arguments: Annotated[list[str] | None, typer.Argument(help="options of the harness")] = None) -> None:
    """Run lm-evaluation-harness through the decode path, with the harness's options and --model_args target=..."""
    try:
        from specdecode.evals.harness import run
    except ImportError as error:
        raise ValueError(f"this needs lm-evaluation-harness ({error}): pip install 'specdecode[lm-eval]'") from error
    run(arguments or [])
