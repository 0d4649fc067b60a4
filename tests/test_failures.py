"""Errors on a serving path: counted, said once per cause per interval, and kept from the caller."""

from __future__ import annotations

import logging

from vcache.failures import FailureLog

logger = logging.getLogger("vcache.test-failures")


def said(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_cause_is_said_once_per_interval_and_counted_always(caplog):
    failures = FailureLog(logger, interval_s=3600)
    with caplog.at_level(logging.WARNING, logger="vcache.test-failures"):
        for _ in range(3):
            failures.record("store", OSError("no space"))
        failures.record("store", ValueError("odd"))
        failures.record("lookup", OSError("no space"))
    assert failures.total == 5
    assert [line.split(";")[0] for line in said(caplog)] == [
        "store failed (OSError: no space)",
        "store failed (ValueError: odd)",
        "lookup failed (OSError: no space)",
    ]


def test_without_an_interval_every_one_is_said(caplog):
    failures = FailureLog(logger, interval_s=0)
    with caplog.at_level(logging.WARNING, logger="vcache.test-failures"):
        failures.record("store", OSError("a"))
        failures.record("store", OSError("b"))
    assert len(said(caplog)) == 2


def test_the_traceback_is_there_at_debug(caplog):
    failures = FailureLog(logger)
    with caplog.at_level(logging.DEBUG, logger="vcache.test-failures"), failures.contained("copy"):
        raise RuntimeError("illegal access")
    assert failures.total == 1
    assert "test_the_traceback_is_there" in caplog.text
