"""Closing waits for calls under way, for a bounded time, and lets no more in."""

from __future__ import annotations

import threading

from vcache.in_flight import InFlight


def test_closing_waits_for_the_calls_inside():
    calls = InFlight()
    assert calls.enter()
    waiting = threading.Thread(target=calls.close, args=(60.0,))
    waiting.start()
    while calls.enter():  # until the other thread has closed it
        calls.leave()
    assert waiting.is_alive()
    calls.leave()
    waiting.join()
    assert calls.close(0.0) == 0


def test_a_call_that_never_ends_is_told():
    calls = InFlight()
    assert calls.enter()
    assert calls.close(0.0) == 1
    assert not calls.enter()
    calls.leave()
    assert calls.close(0.0) == 0
