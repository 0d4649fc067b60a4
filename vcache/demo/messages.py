"""How the demo and its children talk: JSON lines, requests on the child's standard input, answers on a pipe of their own.

Standard output and error stay free for what engines print; they go to a log file that the parent shows when a child fails.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


class Reporter:
    """The child's end; ``fd`` is inherited from the parent."""

    def __init__(self, fd: int) -> None:
        self._pipe = os.fdopen(fd, "w", encoding="utf-8")

    def stage(self, text: str) -> None:
        """Says what the child does now."""
        self._send({"stage": text})

    def result(self, values: dict[str, Any]) -> None:
        """Hands over what came out: once when the child is ready, then once for each request."""
        self._send({"result": values})

    def _send(self, message: dict[str, Any]) -> None:
        self._pipe.write(json.dumps(message) + "\n")
        self._pipe.flush()


def requests() -> Iterator[str]:
    """What the parent asks for, until it wants no more or is gone: JSON, one request a line."""
    while line := sys.stdin.readline():
        yield line
