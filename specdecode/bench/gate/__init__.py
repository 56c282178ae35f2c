"""Judgements of a run by its baseline. Nothing here imports torch."""
