"""Runs as they are kept: records, their files, their statistics. Nothing here imports torch."""
