"""The quality suite: its session, tables, page and figures."""
