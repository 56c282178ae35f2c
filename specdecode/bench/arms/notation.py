"""The notation of an arm's keys in error messages: as the user wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Notation:
    """The notation of keys in the source of an arm.

    Attributes:
        arm: the arm's name; "" if there is only one arm.
        option: format of a `{key}` and its `{value}`.
        choice: format of a part's `{key}` and its kind, the `{value}`.
        unknown: message about unknown `{keys}`. `{known}` are the known keys, and `{first}` is the first unknown key.
        renamed: names of keys that differ in this source.
    """

    arm: str = ""
    option: str = "{key}"
    choice: str = "the {key} {value!r}"
    unknown: str = "it has unknown options: {keys}; choose from {known}"
    renamed: Mapping[str, str] = field(default_factory=dict)

    def key(self, key: str, value: object = "") -> str:
        """Return a key in this notation, with its value if the notation shows values."""
        return self.option.format(key=self.renamed.get(key, key), value=value)

    def word(self, key: str) -> str:
        """Return a key in this notation, without a value."""
        return self.key(key).removesuffix("=")

    def kind(self, part: str, kind: str) -> str:
        """Return the choice of a part's kind in this notation."""
        return self.choice.format(key=self.renamed.get(part, part), value=kind)

    def error(self, message: object) -> ValueError:
        """Return an error that names the arm."""
        return ValueError(f"{self.arm}: {message}" if self.arm else str(message))


def preset_notation(arm: str) -> Notation:
    """Return the notation of presets and run files. Their draft model belongs to the session, not to the arm."""
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
