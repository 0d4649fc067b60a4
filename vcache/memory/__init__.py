"""Where a segment's bytes live: host memory shared between processes (``host``), VRAM shared between them (``cuda``).

Imports neither: a process without a GPU's driver, or one that never touches torch, loads only what it uses.
"""
