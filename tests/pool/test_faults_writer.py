"""Writers that die, or are suspended past their deadline and go on, between any two steps of a write.

Whatever the step: an entry is absent or whole, nobody else's bytes are touched, and the space comes back once the writer is
proven dead or has acknowledged.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.pool.payloads import NBYTES, load, new_keys, store, until
from tests.pool.stopping_writer import STEPS

MIB = 1 << 20
#: A step of each kind in every run, all of them in the slow one.
EACH_STEP = [
    step if step in ("reserve", "copy_half", "commit_records") else pytest.param(step, marks=pytest.mark.slow)
    for step in STEPS
]
#: 64 KiB payloads that 2 MiB of segment hold, beside the directory.
ROOM = (2 * MIB - 4096 - 64 * 128) // NBYTES


@pytest.fixture
def pool(quick, open_client, open_donor):
    config, server = quick
    donor = open_donor(config, size=2 * MIB)
    return config, server, open_client(config), donor


def start_writer(processes, config, keys, **stops):
    """``stops``: a signal by the step after which the writer sends it to itself."""
    said = ",".join(f"{step}:{number.name}" for step, number in stops.items())
    child = processes.python("-m", "tests.pool.stopping_writer", said, *[key.hex() for key in keys], config=config)
    child.expect("starting")
    return child


def wait_suspended(child) -> None:
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)


def stats_of(client):
    stats = client.stats()
    assert stats is not None
    return stats


def all_space_comes_back(client, donor) -> None:
    """Every byte of the segment can be stored to, and read back."""
    until(lambda: stats_of(client).reservations == 0, "no reservation is left")
    client.clear()
    keys = new_keys(ROOM)
    until(lambda: store(client, keys) >= 0 and client.lookup(b"".join(keys)).hits == ROOM, "all the space is free")
    assert load(client, keys) == ROOM
    donor.segment.check_integrity()


def absent_or_whole(client, keys) -> None:
    for key in keys:
        assert load(client, [key]) in (0, 1)  # and every byte of what is served is checked


@pytest.mark.parametrize("step", EACH_STEP)
def test_a_writer_killed_after_a_step(pool, processes, step):
    config, _, client, donor = pool
    keys = new_keys(3)
    child = start_writer(processes, config, keys, **{step: signal.SIGKILL})
    assert child.wait() == -signal.SIGKILL
    absent_or_whole(client, keys)
    until(
        lambda: store(client, keys) == 3 or client.lookup(b"".join(keys)).hits == 3, "the keys can be stored by others"
    )
    assert load(client, keys) == 3
    all_space_comes_back(client, donor)
    assert client.runtime.live_writers() == [client.session.id]


@pytest.mark.parametrize("step", EACH_STEP)
def test_a_writer_suspended_after_a_step_past_its_deadline_and_resumed(pool, processes, step):
    config, _, client, donor = pool
    keys = new_keys(3)
    child = start_writer(processes, config, keys, **{step: signal.SIGSTOP})
    wait_suspended(child)
    # What is told may still be in the suspended process, whose threads send it.
    until(
        lambda: stats_of(client).counters["reservations_expired"] == 3 or (step == "tell" and load(client, keys) == 3),
        "the deadline frees the keys",
    )
    is_told = step == "tell" and load(client, keys) == 3
    if not is_told:
        assert load(client, keys) == 0
        assert store(client, keys) == 3, "others may write the keys"
    assert load(client, keys) == 3
    assert client.pin(b"".join(keys), 60.0) == 3
    # All other space is taken by others; what the suspended writer was granted is not, however long it is silent.
    until(lambda: stats_of(client).sessions == 2, "the suspended writer is taken for silent")
    others = new_keys(ROOM)
    stored = store(client, others, pin_s=60.0)
    assert stored <= ROOM - (3 if is_told else 6)
    assert store(client, new_keys(1)) == 0
    os.kill(child.pid, signal.SIGCONT)
    child.expect("stored")
    assert load(client, keys) == 3
    assert load(client, others[:stored]) == stored
    all_space_comes_back(client, donor)
    child.popen.stdin.close()
    assert child.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", ["mark", "copy_half", "commit_records"])
def test_a_writer_suspended_until_it_is_killed_gives_its_space_back(pool, processes, step):
    config, _, client, donor = pool
    keys = new_keys(3)
    child = start_writer(processes, config, keys, **{step: signal.SIGSTOP})
    wait_suspended(child)
    until(lambda: stats_of(client).sessions == 2, "the suspended writer is taken for silent")
    assert stats_of(client).reservations == 3, "silence proves nothing"
    child.kill()
    all_space_comes_back(client, donor)


@pytest.mark.parametrize("step", EACH_STEP)
def test_a_writer_suspended_while_the_server_restarts_spoils_nothing(pool, processes, step):
    """Grants wait for it; entries are back meanwhile; when it goes on, it says what it held."""
    config, server, client, donor = pool
    present, keys = new_keys(4), new_keys(3)
    assert store(client, present) == 4
    child = start_writer(processes, config, keys, **{step: signal.SIGSTOP})
    wait_suspended(child)
    server.kill()
    processes.server(config)
    until(lambda: load(client, present) == 4, "the entries are back")
    absent_or_whole(client, keys)
    assert store(client, new_keys(2)) == 0, "nothing is granted while a writer of the earlier term may be at work"
    os.kill(child.pid, signal.SIGCONT)
    child.expect("stored")
    until(lambda: store(client, new_keys(1)) == 1, "the gate opens once it has said hello")
    assert load(client, present) == 4
    absent_or_whole(client, keys)
    all_space_comes_back(client, donor)


@pytest.mark.parametrize(
    "step",
    [
        "mark",
        *[pytest.param(step, marks=pytest.mark.slow) for step in ("mark_first", "copy_half", "commit_records", "tell")],
    ],
)
def test_a_writer_resumed_after_a_restart_that_dies_before_it_says_hello(pool, processes, step):
    """Its donor has scanned the records before it marked its own: nobody but the donor can tell of them."""
    config, server, client, donor = pool
    present, keys = new_keys(4), new_keys(3)
    assert store(client, present) == 4
    child = start_writer(processes, config, keys, reserve=signal.SIGSTOP, **{step: signal.SIGKILL})
    wait_suspended(child)
    server.kill()
    processes.server(config)
    until(lambda: load(client, present) == 4, "the entries are back")
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait() == -signal.SIGKILL
    until(lambda: store(client, new_keys(1)) == 1, "the gate opens once the writer is proven dead")
    assert load(client, present) == 4
    absent_or_whole(client, keys)
    all_space_comes_back(client, donor)
