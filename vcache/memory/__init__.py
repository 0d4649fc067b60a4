"""Where a segment's bytes live: host memory shared between processes (``host``), VRAM shared by CUDA IPC (``cuda``).

Imports neither: a process without CuPy, or one that never touches torch, loads only what it uses.
"""
