"""Two hosts with networks of their own, joined by a link that can be cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Worker
from tests.engine.kv import CHUNK
from tests.pool.payloads import until
from vcache.config import VCacheConfig
from vcache.curve import create_key_files

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
SERVER, DONOR = "10.77.31.1", "10.77.31.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, with a link between them."""
    here, there = f"vct-{os.getpid()}-a", f"vct-{os.getpid()}-b"
    made = []
    try:
        for name in (here, there):
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if added.returncode:
                pytest.skip(f"no network namespace can be made here: {added.stderr.strip()}")
            made.append(name)
        ip("-n", here, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", there)
        for name, address in ((here, SERVER), (there, DONOR)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "link0", "up")
        yield here, there
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_a_cut_link_is_a_miss_within_the_deadline_and_is_found_again(
    networks, runtime_dir: Path, other_runtime_dir: Path, tmp_path: Path, processes
):
    here, there = networks
    create_key_files(tmp_path, "server")
    create_key_files(tmp_path / "clients", "one")

    def config(directory: Path) -> VCacheConfig:
        return VCacheConfig(
            runtime_dir=str(directory),
            server={
                "endpoint": f"tcp://{SERVER}:5555",
                "heartbeat_interval": 0.1,
                "liveness_timeout": 120.0,
                "curve": {
                    "server_secret_key_file": str(tmp_path / "server.key_secret"),
                    "authorized_clients_dir": str(tmp_path / "clients"),
                    "server_public_key_file": str(tmp_path / "server.key"),
                    "client_secret_key_file": str(tmp_path / "clients" / "one.key_secret"),
                },
            },
            transfer={"remote": "mooncake", "remote_timeout": 3.0, "staging_size": "32MiB"},
            client={"connect_timeout": 60.0, "call_timeout": 5.0},
        )

    def start(network: str, directory: Path, *arguments: str):
        return processes.start(["ip", "netns", "exec", network, sys.executable, *arguments], config=config(directory))

    def worker(network: str, directory: Path) -> Worker:
        started = Worker(start(network, directory, "-m", "tests.engine.worker", json.dumps({})))
        assert json.loads(started.child.line())["ready"], started.child.report()
        return started

    start(here, runtime_dir, "-m", "vram_metadata_server")
    start(there, other_runtime_dir, "-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "16MiB").expect(
        "donating"
    )
    writer, reader = worker(there, other_runtime_dir), worker(here, runtime_dir)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    whole = {"loaded": 32, "wrong": []}
    until(lambda: reader.do("retrieve", tokens=TOKENS, blocks=THERE) == whole, "the chunks over the link")
    ip("-n", there, "link", "set", "link0", "down")
    for _ in range(5):
        assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 0, "wrong": []}
    stats = reader.do("stats")
    assert stats["client_remote_lost_hits"] == 4, "one call waited for it"
    assert stats["server_available"]
    ip("-n", there, "link", "set", "link0", "up")
    until(lambda: reader.do("retrieve", tokens=TOKENS, blocks=THERE) == whole, "the chunks, once the link is back")
