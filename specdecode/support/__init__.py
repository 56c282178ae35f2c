"""Helpers that every other room may use: files, git, progress, and a description of the machine."""
