"""`specdecode doctor --head`: check whether a head is wired as its weights were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from specdecode.cli.output import plain_table, say, say_tables
from specdecode.support.progress import progress

if TYPE_CHECKING:
    from specdecode import LM
    from specdecode.heads.doctor import Examination, GreedyText, Measured, Tell

_PROMPTS = "code:6,prose:6"
_MAX_NEW_TOKENS = 128


def examine_head(
    name: str,
    target: str | None,
    prompts: str | None,
    max_new_tokens: int | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Print the acceptance of a head with each likely wiring, and the best wiring. Exit code 1: the wiring in its
    config is not the best."""
    from specdecode import load
    from specdecode.evals.data import token_prompts
    from specdecode.heads.doctor import examine
    from specdecode.heads.loading import head_files
    from specdecode.models.embedded import EMBEDDED

    length = _MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if length < 1:
        raise ValueError(f"--max-new-tokens is {length}: it is a number from 1")
    files = head_files(name)
    model = load(target or EMBEDDED, device=device, dtype=dtype, backend="eager")
    chosen, origins = token_prompts(prompts or _PROMPTS, model)
    with progress("texts") as tell:
        texts = write_texts(model.with_backend("auto"), chosen, length, tell)
    with progress("wirings") as tell:
        examination = examine(files, model, texts, tell)
    say(f"{len(texts)} texts by {model.name}, after prompts from {'; '.join(origins)}")
    say_tables(_table(examination), highlight=False)
    sentence, right = _conclusion(examination)
    say(sentence)
    if not right:
        raise typer.Exit(1)


def write_texts(
    target: LM, prompts: Mapping[str, Sequence[int]], length: int, tell: Tell = lambda done, total, doing: None
) -> list[GreedyText]:
    """Let a target continue prompts greedily, up to a stop token.

    Args:
        target: target of the head.
        prompts: token ids by name.
        length: most tokens of a continuation.
        tell: called with the number of finished texts, the number of all texts, and a name of the current work.

    Raises:
        ValueError: a prompt does not fit the context, or too few continuations are long enough for a judgement.
    """
    import torch

    from specdecode import generate
    from specdecode.heads.doctor import LEAST_TEXTS, LEAST_TOKENS, GreedyText

    texts = []
    for number, (name, prompt) in enumerate(prompts.items()):
        tell(number, len(prompts), "texts of the target")
        if len(prompt) + length > target.context_length:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, and {length} more do not fit the context of {target.name}, which"
                f" holds {target.context_length}: take shorter prompts"
            )
        written = generate(target, prompt, max_new_tokens=length, stop_token_ids=target.stop_token_ids).tokens
        if len(written) >= LEAST_TOKENS:
            texts.append(GreedyText(torch.tensor([*prompt, *written]), len(prompt)))
    if len(texts) < LEAST_TEXTS:
        raise ValueError(
            f"{target.name} continues {len(texts)} of {len(prompts)} prompts by {LEAST_TOKENS} tokens or more: a"
            f" judgement needs {LEAST_TEXTS} such texts, so give more or other prompts"
        )
    return texts


def _table(examination: Examination) -> Table:
    first, *_ = examination.measured
    positions = (f"token {position}" for position, _ in enumerate(first.by_position, 1))
    table = plain_table("wiring", *positions, "tokens a step", "gain")
    for measured in examination.measured:
        stated = measured is first
        table.add_row(
            measured.wiring.name,
            *(f"{share:.0%}" for share in measured.by_position),
            f"{measured.mean_acceptance_length:.2f}",
            measured.unusable and "cannot be used" if stated else _gain(measured),
        )
    return table


def _gain(measured: Measured) -> str:
    return f"{measured.gain:+.2f} ({measured.low:+.2f} to {measured.high:+.2f})"


def _conclusion(examination: Examination) -> tuple[str, bool]:
    """Return the conclusion in one sentence, and whether the head's config is right."""
    stated, *_ = examination.measured
    better = examination.better
    if not examination.drafts:
        return "no wiring accepts even a token in ten steps: this head was not trained for this target", False
    if better is not None:
        gain = f"{better.mean_acceptance_length:.2f} tokens a step in place of {stated.mean_acceptance_length:.2f}"
        return f"not wired as trained: {better.wiring.remedy}, which brings {gain}", False
    if examination.refusal:
        return f"no other wiring accepts more, but the head cannot be loaded: {examination.refusal}", False
    return "wired as trained: no other wiring accepts more", True
