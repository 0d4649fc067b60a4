"""A donor of VRAM, its records, and a client on another GPU, over the stand-in of the driver: no payloads, and no torch in the donor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool.payloads import until
from vcache.pool.runtime_dir import RuntimeDir

KEY = "0123456789abcdef" * 2


@pytest.fixture
def donor(server, stand_in, processes):
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cuda:0", "--size", "8MiB", extra=stand_in)
    child.expect("donating")
    return child


@pytest.fixture
def client(donor, stand_in, processes):
    child = processes.python("-m", "tests.memory.pool_client", extra=stand_in)
    child.expect("ready")
    return child


def ask(child, command):
    child.tell(command)
    return child.line()


def test_a_donor_of_vram_loads_no_torch(donor):
    assert "libtorch" not in Path(f"/proc/{donor.pid}/maps").read_text()


def test_records_in_vram_tell_a_new_server_and_are_retired_by_small_copies(server, donor, client, config, processes):
    assert ask(client, f"store {KEY}") == "stored 1"
    assert ask(client, f"lookup {KEY}") == "hits 1"
    server.kill()
    processes.server(config)
    until(lambda: ask(client, f"lookup {KEY}") == "hits 1", "the new server knows it")
    assert ask(client, f"remove {KEY}") == "removed 1"
    assert ask(client, f"lookup {KEY}") == "hits 0"


def test_a_donor_that_is_killed_leaves_what_is_mapped_readable_and_no_socket(donor, client, runtime_dir):
    assert ask(client, f"store {KEY}") == "stored 1"
    assert ask(client, "read") == "magic True"
    donor.kill()
    assert ask(client, "read") == "magic True"
    [socket] = runtime_dir.glob("segment-*.sock")
    assert socket.name in RuntimeDir(runtime_dir).sweep()
