"""Describe dataclasses in JSON Schema (draft 2020-12), from their fields and their docstrings."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Union, get_args, get_origin, get_type_hints

from specdecode.support.checked import MOST

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """The properties of a dataclass in a file that its fields do not show.

    Attributes:
        keys: key in the file by field name, where they differ.
        required: fields with a default that are in every file.
        optional: fields without a default that older files lack.
        bounds: least and greatest value of numbers, by field; by default from 0 to `checked.MOST`.
        patterns: regular expressions that texts match, by field.
        nullable: fields whose None is null in the file; other fields that are None are left out.
        flat: whether the fields of nested dataclasses stand among the fields of this class.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    required: Collection[str] = ()
    optional: Collection[str] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    nullable: Collection[str] = ()
    flat: bool = False


class Definitions:
    """Schemas of dataclasses that refer to each other.

    Attributes:
        schemas: schemas by class name, for "$defs".
    """

    def __init__(self, forms: Mapping[type, Form] = MappingProxyType({})) -> None:
        self._forms = forms
        self.schemas: dict[str, Schema] = {}

    def refer(self, kind: type) -> Schema:
        """Return a reference to the schema of a dataclass. Define the schema if it is new."""
        if kind.__name__ not in self.schemas:
            self.schemas[kind.__name__] = {}  # ends the recursion of classes that refer to themselves
            self.schemas[kind.__name__] = self.object(kind)
        return {"$ref": f"#/$defs/{kind.__name__}"}

    def object(self, kind: type) -> Schema:
        """Return the schema of a dataclass as an object in a file. The object may have further keys."""
        summary, _, _ = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
        properties, required = self._properties(kind)
        schema: Schema = {"title": title(kind.__name__), "description": " ".join(summary.split()), "type": "object"}
        return schema | {"required": required, "properties": properties}

    def _properties(self, kind: type) -> tuple[dict[str, Schema], list[str]]:
        form, hints, texts = self._forms.get(kind, Form()), get_type_hints(kind), attribute_docs(kind)
        properties: dict[str, Schema] = {}
        required: list[str] = []
        for entry in fields(kind):
            hint = hints[entry.name] if entry.name in form.nullable else _known(hints[entry.name])
            if form.flat and is_dataclass(hint):
                properties |= self._properties(_as_class(hint))[0]
                continue
            key = form.keys.get(entry.name, entry.name)
            about = {"title": title(key), "description": texts[entry.name]}
            properties[key] = about | self._value(hint, entry, form)
            always = not _has_default(entry) and hint == hints[entry.name] and entry.name not in form.optional
            if always or entry.name in form.required:
                required.append(key)
        return properties, required

    def _value(self, hint: Any, entry: Field[Any], form: Form) -> Schema:
        """Return the schema of a field's value, from its type."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return {"anyOf": [self._value(argument, entry, form) for argument in arguments]}
        if origin is dict:
            keys, values = arguments
            names = {"propertyNames": {"pattern": "^[1-9][0-9]{0,9}$"}} if keys is int else {}
            return {"type": "object", **names, "additionalProperties": self._value(values, entry, form)}
        if origin is list:
            return {"type": "array", "items": self._value(arguments[0], entry, form)}
        if is_dataclass(hint):
            return self.refer(_as_class(hint))
        if hint is Any:
            return {}
        if hint in (int, float):
            least, most = form.bounds.get(entry.name, (entry.metadata.get("least", 0), MOST))
            return {"type": _NAMES[hint], "minimum": least, "maximum": most}
        pattern = {"pattern": form.patterns[entry.name]} if entry.name in form.patterns else {}
        return {"type": _NAMES[hint], **pattern}


_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def format_entry(version: int) -> Schema:
    """Return the schema of the key "format"."""
    text = "Version of this format. A file with another number has another schema."
    return {"title": "Format", "description": text, "const": version}


def attribute_docs(kind: type) -> dict[str, str]:
    """Return the descriptions of fields from the docstrings of a class and its bases, by field name."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for names, text in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            sentence = " ".join(text.split())
            texts |= dict.fromkeys(names.split(", "), sentence[:1].upper() + sentence[1:])
    return texts


def title(name: str) -> str:
    """Turn a key or a class name into words."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()
    return words[:1].upper() + words[1:]


def _has_default(entry: Field[Any]) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _known(hint: Any) -> Any:
    """Return an optional type without None; any other type unchanged."""
    known = [argument for argument in get_args(hint) if argument is not type(None)]
    return known[0] if len(known) == 1 and type(None) in get_args(hint) else hint


def _as_class(hint: Any) -> type:
    assert isinstance(hint, type)
    return hint
