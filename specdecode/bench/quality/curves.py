"""The curves of a quality run along its documents, for print and for pages."""

from __future__ import annotations

from typing import NamedTuple


class Curve(NamedTuple):
    """A measure along a document; see `QualityRun.curve`.

    Attributes:
        measure, along: arguments of `QualityRun.curve`.
        title: title of the chart.
        y_name, x_name: names of the axes.
    """

    measure: str
    along: str
    title: str
    y_name: str
    x_name: str


CURVES = (
    Curve("kl", "position", "KL by position, nats a token", "KL, nats a token", "position, tokens"),
    Curve(
        "kl", "since", "KL since the last eviction, nats a token", "KL, nats a token", "tokens since the last eviction"
    ),
    Curve("agrees", "position", "Top-1 agreement by position", "top-1 agreement", "position, tokens"),
)

KL_THRESHOLD_NATS = 0.01
"""KL above this value is drawn on a logarithmic scale, KL below it on a linear one, because KL may be 0."""
