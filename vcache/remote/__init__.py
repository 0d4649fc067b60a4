"""Segments of other hosts, read through a transfer engine that runs in processes of its own (docs/remote.md)."""
