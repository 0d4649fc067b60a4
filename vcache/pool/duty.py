"""What a donor does in its client's background thread, which opens sessions, hears the server and keeps the time."""

from __future__ import annotations

from typing import Protocol

from vcache.protocol import Orders


class Duty(Protocol):
    """What a donor does in this thread. Every method returns soon; none waits."""

    def on_session(self, *, was_suspended: bool) -> None:
        """A session is open, in a new term or again in the same. ``was_suspended``: this process may have been silent for
        longer than the server waits, without the server's word on it."""

    def on_orders(self, orders: Orders) -> None:
        """The server's orders, of the present term."""

    def on_gone(self, number: int) -> None:
        """The server has dropped a segment that this process has mapped, perhaps this donor's."""

    def on_tick(self) -> None:
        """Between messages, at least once per heartbeat."""
