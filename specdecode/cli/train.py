"""`specdecode train-head`: train a draft head."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from specdecode.cli.output import say
from specdecode.support.files import check_writable
from specdecode.support.messages import note
from specdecode.support.progress import progress


def train_head(
    out: Annotated[Path, typer.Option(help="folder of the head, an EAGLE-3 head in the format of speculators")],
    target: Annotated[str, typer.Option(help="embedded model, hub id or local folder")] = "smollm2-135m",
    data: Annotated[
        str,
        typer.Option(
            help="data sets with documents; chat, conversations that the target writes; ask, its answers to questions"
            " about passages of the data sets. Repeat a name for a larger share"
        ),
    ] = "code,prose,chat,ask",
    tokens: Annotated[
        int, typer.Option(help="number of tokens to train on, rounded up to whole shards of 256 texts")
    ] = 1_000_000,
    length: Annotated[int, typer.Option(help="tokens of a text")] = 256,
    own: Annotated[float, typer.Option(help="share of the texts that the target continues itself")] = 0.5,
    held_out: Annotated[int, typer.Option(help="number of documents to leave out at the start of each data set")] = 20,
    layers: Annotated[
        str | None, typer.Option(help="target layers whose outputs are read: 2,15,29  [default: first, middle, last]")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="number of most frequent tokens that the head can propose  [default: 8192]")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="a head that was trained before, to train further. It keeps its layers and its vocabulary"
            "  [default: a copy of the target's last layer]",
        ),
    ] = None,
    shared_output: Annotated[
        bool,
        typer.Option(
            "--shared-output",
            help="do not store the output embedding, which is the target's: then only this package can use the head",
        ),
    ] = False,
    epochs: Annotated[int, typer.Option(help="number of passes over all texts")] = 3,
    batch: Annotated[int, typer.Option(help="texts in a step")] = 2,
    ahead: Annotated[int, typer.Option(help="tokens that are predicted from each place")] = 4,
    rate: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(help="seed of the texts and the training")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="type of the target: float32, float16, bfloat16  [default: float32 on a CPU, else float16]"),
    ] = None,
) -> None:
    """Train a draft head for a target. Repeat the command to continue an interrupted training."""
    from specdecode import load
    from specdecode.training.recipe import Recipe, work_folder
    from specdecode.training.recipe import train_head as train
    from specdecode.training.trainer import TrainingSettings

    recipe = Recipe(
        data=tuple(part.strip() for part in data.split(",")),
        tokens=tokens,
        length=length,
        own=own,
        held_out=held_out,
        layers=_layer_numbers(layers),
        vocabulary=vocabulary,
        start=start,
        shared_output=shared_output,
        settings=TrainingSettings(epochs, batch, ahead, rate, seed),
    )
    _check_folders(out, work_folder(out), start)
    model = load(target, device=device, dtype=dtype, backend="eager")
    try:
        with progress("texts") as tell:
            card = train(model, target, recipe, out, shlex.join(["specdecode", *sys.argv[1:]]), tell)
    except KeyboardInterrupt:
        note("The same command goes on after the last finished shard of 256 texts.")
        raise
    for number, epoch in enumerate(card["epochs"], start=1):
        taus = ", ".join(f"{task} {tau:.2f}" for task, tau in epoch["acceptance"].items())
        say(f"epoch {number}: loss {epoch['losses'][0]:.3f}, tokens a step {taus}")
    say(f"the head and its card are in {out}; the folder {work_folder(out)} can be removed")


def _layer_numbers(layers: str | None) -> tuple[int, ...]:
    numbers = layers.split(",") if layers else []
    if not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"layers is {layers!r}: write numbers with commas, such as 2,15,29")
    return tuple(map(int, numbers))


def _check_folders(out: Path, work: Path, start: str | None) -> None:
    """Raise an error if the head could not be written, or would replace the head that it starts with."""
    from specdecode.heads.eagle3_files import CONFIG, OWN, PAGE, WEIGHTS

    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file: a head is a folder")
    if start is not None and Path(start).expanduser().resolve() == out.resolve():
        raise ValueError(f"start and out are both {out}: name another folder for the new head")
    if work.exists():
        check_writable(work / "shards.json")
    for name in (CONFIG, WEIGHTS, PAGE, OWN):
        check_writable(out / name)
