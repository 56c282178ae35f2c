"""Draft heads: their modules, their file formats, and heads that are bound to a target."""
