"""The circuit breaker's state machine: when a store may be called, and when it is worth a probe. No threads, no clock.

    closed --failures in a row--> open --a probe succeeds--> half-open --a call succeeds--> closed
                                   ^                            |
                                   +------ a call fails --------+

While open no call goes through; a probe is due after a delay that doubles from failure to failure, with jitter so that a
thousand clients do not knock at once. Half-open lets one call at a time through: a store that answers probes but cannot
deliver costs one deadline per delay, no more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import StrEnum


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Not thread-safe: the guard calls it under its lock. Times are seconds of any one monotonic clock."""

    def __init__(
        self,
        *,
        failures: int,
        first_delay_s: float,
        longest_delay_s: float,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._failures_to_open = failures
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._jitter = jitter
        self._failures = 0  # in a row
        self._openings = 0  # since the last success of a call
        self._trial = False  # half-open: the one call is under way
        self.circuit = Circuit.CLOSED
        self.probe_due = float("inf")

    def admit(self) -> bool:
        """Whether a call may go through now; one that does is followed by ``succeeded``, ``failed`` or ``withdrawn``."""
        if self.circuit is Circuit.CLOSED:
            return True
        if self.circuit is Circuit.OPEN or self._trial:
            return False
        self._trial = True
        return True

    def succeeded(self) -> None:
        """A call succeeded. One that was under way when the circuit opened does not close it: the probe will tell."""
        self._trial = False
        if self.circuit is Circuit.OPEN:
            return
        self.circuit, self._failures, self._openings = Circuit.CLOSED, 0, 0

    def failed(self, now: float) -> None:
        self._trial = False
        self._failures += 1
        if self.circuit is Circuit.HALF_OPEN or (
            self.circuit is Circuit.CLOSED and self._failures >= self._failures_to_open
        ):
            self._open(now)

    def withdrawn(self) -> None:
        """A call that was let through ended without a word on the store (it was never begun)."""
        self._trial = False

    def probe_succeeded(self) -> None:
        if self.circuit is Circuit.OPEN:
            self.circuit, self.probe_due = Circuit.HALF_OPEN, float("inf")

    def probe_failed(self, now: float) -> None:
        if self.circuit is Circuit.OPEN:
            self._open(now)

    def _open(self, now: float) -> None:
        delay_s = min(self._longest_delay_s, self._first_delay_s * 2 ** min(self._openings, 30))
        self._openings += 1
        self.circuit, self.probe_due = Circuit.OPEN, now + self._jitter(delay_s / 2, delay_s)
