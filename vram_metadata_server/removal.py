"""A ``Remove`` or ``Clear`` under way: what it still waits for before it may be answered.

Removed means gone: the answer comes when every record concerned is retired in memory (or its segment is no more), so that
not even a restart of the server can bring an entry back.
"""

from __future__ import annotations

from vcache.protocol import Done


class Removal:
    """Counts what is outstanding: each ``wait`` is met by one ``settle``; with the last one the answer is due."""

    __slots__ = ("_answers", "_request", "_route", "_waits", "count")

    def __init__(self, route: bytes, request: int, answers: list[tuple[bytes, Done]]) -> None:
        self._route = route
        self._request = request
        self._answers = answers  # where the answer is put
        self._waits = 1  # its own start: ``settle`` once when everything to wait for is known
        self.count = 0  # entries removed

    def wait(self) -> None:
        self._waits += 1

    def settle(self) -> None:
        self._waits -= 1
        if self._waits == 0:
            self._answers.append((self._route, Done(self._request, self.count)))
