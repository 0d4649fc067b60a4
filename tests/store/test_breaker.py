"""The circuit breaker: which calls go through when, for every order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vcache.store.breaker import Breaker, Circuit


def breaker(failures: int = 3) -> Breaker:
    return Breaker(failures=failures, first_delay_s=1.0, longest_delay_s=8.0, jitter=lambda low, high: high)


def opened() -> Breaker:
    machine = breaker(1)
    machine.failed(now=0.0)
    return machine


def test_it_opens_after_failures_in_a_row_only():
    machine = breaker(3)
    for _ in range(5):
        machine.failed(0.0)
        machine.failed(0.0)
        machine.succeeded()
    assert machine.circuit is Circuit.CLOSED
    for _ in range(3):
        machine.failed(0.0)
    assert machine.circuit is Circuit.OPEN
    assert not machine.admit()


def test_half_open_lets_one_call_through_at_a_time():
    machine = opened()
    machine.probe_succeeded()
    assert machine.admit()
    assert not machine.admit()
    machine.withdrawn()
    assert machine.admit()
    machine.succeeded()
    assert machine.circuit is Circuit.CLOSED


def test_delays_double_up_to_the_longest_and_start_over_after_a_success():
    machine = opened()
    delays = []
    for _ in range(6):
        delays.append(machine.probe_due)
        machine.probe_failed(now=0.0)
    assert delays == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    machine.probe_succeeded()
    machine.admit()
    machine.succeeded()
    machine.failed(now=0.0)
    assert machine.probe_due == 1.0


def test_a_store_that_answers_probes_but_fails_calls_is_tried_less_and_less():
    machine = opened()
    delays = []
    for _ in range(5):
        machine.probe_succeeded()
        machine.admit()
        machine.failed(now=0.0)
        delays.append(machine.probe_due)
    assert delays == [2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_call_from_before_the_opening_does_not_close_it():
    machine = opened()
    machine.succeeded()
    assert machine.circuit is Circuit.OPEN


class AnyOrder(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.machine = breaker(2)
        self.now = 0.0

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(event=st.sampled_from(["succeeded", "withdrawn", "probe_succeeded", "failed", "probe_failed"]))
    def happens(self, event):
        arguments = (self.now,) if event in {"failed", "probe_failed"} else ()
        getattr(self.machine, event)(*arguments)

    @rule()
    def calls(self):
        admitted = self.machine.admit()
        assert not (admitted and self.machine.circuit is Circuit.OPEN)

    @invariant()
    def a_probe_is_due_exactly_while_open(self):
        is_due = self.machine.probe_due != float("inf")
        assert is_due == (self.machine.circuit is Circuit.OPEN)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=30)
