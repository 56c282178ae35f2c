"""Name an arm's keys in error messages as the user wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Notation:
    """How keys are written where an arm comes from.

    Attributes:
        arm: the arm's name; "" where there is only one.
        option: a `{key}` and its `{value}`.
        choice: the `{key}` of a part and the kind that is its `{value}`.
        unknown: the message about `{keys}` that are none of the `{known}` ones; `{first}` is one of them.
        renamed: keys that have another name there.
    """

    arm: str = ""
    option: str = "{key}"
    choice: str = "the {key} {value!r}"
    unknown: str = "it has unknown options: {keys}; choose from {known}"
    renamed: Mapping[str, str] = field(default_factory=dict)

    def key(self, key: str, value: object = "") -> str:
        """Return a key as it is written, with its value where that is written too."""
        return self.option.format(key=self.renamed.get(key, key), value=value)

    def kind(self, part: str, kind: str) -> str:
        """Return the choice of a part."""
        return self.choice.format(key=self.renamed.get(part, part), value=kind)

    def error(self, message: object) -> ValueError:
        """Return an error that names the arm."""
        return ValueError(f"{self.arm}: {message}" if self.arm else str(message))


def preset_notation(arm: str) -> Notation:
    """Return the notation of presets and run files. A draft model is not the arm's own there, but the session's."""
    return Notation(f"arm {arm!r}", renamed={"draft": "--draft"})


COMMAND_LINE = Notation(
    option="--{key}",
    choice="--{key} {value}",
    renamed={"shape": "tree", "cache": "max-cache", "draft_cache": "max-cache"},
)
"""The notation of `specdecode generate`."""

MODEL_ARGS = Notation(
    option="{key}={value}",
    choice="{key}={value}",
    unknown="model_args has the unknown key {first!r}: choose from {known}",
)
"""The notation of lm-eval's `--model_args`."""
