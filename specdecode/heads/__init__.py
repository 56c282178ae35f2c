"""Draft heads: the module, its file, and a head bound to its target."""
