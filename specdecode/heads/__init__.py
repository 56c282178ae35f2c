"""Draft heads: the module, its file format, and a head bound to its target."""
