"""Tests of memory in VRAM: on a GPU, and as far as a stand-in of the driver shows it on a CPU."""
