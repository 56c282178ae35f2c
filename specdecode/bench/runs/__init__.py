"""Stored runs: records, their files and their statistics. Nothing here imports torch."""
