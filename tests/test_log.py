"""Logging: levels, format, one line per cause per interval, keys as text."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from tests.support.processes import child_environment
from vcache.keys import format_key
from vcache.log import Interval, KeyText, log_once_per

logger = logging.getLogger("vcache.test_log")


def stderr_of(program: str, **extra: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(extra=extra), capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_lines_carry_time_level_role_process_and_module():
    lines = stderr_of(
        "import logging, os; from vcache import log; log.configure('INFO', 'donor cpu:0')\n"
        "logging.getLogger('vcache.pool.donor').info('hello %d', 5)\n"
        "logging.getLogger('vram_metadata_server.shell').debug('unseen')\n"
        "logging.getLogger('vram_metadata_server.shell').warning(os.getpid())"
    )
    pid = lines[1].rpartition(" ")[2]
    assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{3}} INFO    donor cpu:0\[{pid}\] vcache\.pool\.donor: hello 5", lines[0])
    assert lines[1].endswith(f" WARNING donor cpu:0[{pid}] vram_metadata_server.shell: {pid}")
    assert len(lines) == 2


def test_the_level_comes_from_the_environment():
    program = (
        "import logging; from vcache import log; from vcache.config import VCacheConfig\n"
        "log.configure(VCacheConfig().log_level, 'engine')\n"
        "logging.getLogger('vcache.engine').debug('seen')"
    )
    assert stderr_of(program, VCACHE_LOG_LEVEL="INFO") == []
    assert stderr_of(program, VCACHE_LOG_LEVEL="debug")[0].endswith("vcache.engine: seen")


def test_configuring_twice_says_each_line_once_under_the_new_role():
    lines = stderr_of(
        "import logging; from vcache import log; log.configure('INFO', 'engine'); log.configure('INFO', 'rank 3')\n"
        "logging.getLogger('vcache.engine').info('once')"
    )
    assert len(lines) == 1
    assert " rank 3[" in lines[0]


def test_an_application_with_handlers_of_its_own_keeps_them():
    lines = stderr_of(
        "import logging; from vcache import log\n"
        "logging.basicConfig(format='app: %(message)s'); log.configure('DEBUG', 'engine')\n"
        "logging.getLogger('vcache.engine').debug('ours'); logging.getLogger('other').debug('not ours to change')"
    )
    assert lines == ["app: ours"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_cause_is_logged_once_per_interval_and_says_how_many_were_held_back(caplog):
    clock = Clock()
    memory = Interval(clock)

    def fail(cause: str) -> bool:
        return log_once_per(10, cause, logger, logging.WARNING, "%s failed", cause, memory=memory)

    with caplog.at_level(logging.WARNING):
        assert [fail("lookup"), fail("lookup"), fail("store"), fail("lookup")] == [True, False, True, False]
        clock.now = 9.9
        assert not fail("lookup")
        clock.now = 10.0
        assert fail("lookup")
        clock.now = 20.0
        assert fail("lookup")
    assert caplog.messages == [
        "lookup failed",
        "store failed",
        "lookup failed (3 more since the last such line)",
        "lookup failed",
    ]


def test_a_rate_limited_line_names_its_caller(caplog):
    with caplog.at_level(logging.INFO):
        log_once_per(10, "cause", logger, logging.INFO, "said", memory=Interval())
    assert caplog.records[0].filename == os.path.basename(__file__)


def test_what_is_not_logged_at_this_level_is_not_remembered(caplog):
    memory = Interval()
    with caplog.at_level(logging.WARNING):
        assert not log_once_per(10, "cause", logger, logging.DEBUG, "quiet", memory=memory)
        assert log_once_per(10, "cause", logger, logging.WARNING, "loud", memory=memory)


def test_causes_without_end_do_not_grow_the_memory():
    memory = Interval()
    for cause in range(5000):
        assert memory.held_back(10, cause) == 0
    assert memory.held_back(10, 4999) is None
    assert memory.held_back(10, 0) == 0  # long forgotten


@pytest.mark.parametrize("shape", ["blob", "list"])
def test_keys_are_written_in_the_form_an_operator_greps(caplog, shape):
    keys = [bytes([n]) * 16 for n in range(3)]
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        logger.debug("stored %s", KeyText(b"".join(keys) if shape == "blob" else keys))
    assert caplog.messages == ["stored " + " ".join(format_key(key) for key in keys)]
