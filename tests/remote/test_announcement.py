"""What a donor says of its segment to other hosts: read back as said, and nothing else is believed."""

from __future__ import annotations

import os
import socket
import threading
from typing import NamedTuple

import pytest

from tests.pool.payloads import until
from vcache.companion.companion import Companion
from vcache.companion.link import LinkClosedError
from vcache.config import VCacheConfig
from vcache.errors import ConfigError
from vcache.memory.allocation import allocate
from vcache.pool.runtime_dir import RuntimeDir
from vcache.protocol import SegmentInfo, Tier
from vcache.remote.announcement import Announcement, announced, announcement_of
from vcache.remote.base import EngineSetup
from vcache.remote.engine_choice import engine_environment, engine_setup, links_cuda, reads_gpu_memory
from vcache.remote.offer import open_offer
from vcache.remote.segments import RemoteSegments
from vcache.remote.wire import DECODER, ReadFor

WHERE = Announcement("mooncake", "10.0.0.1:15000", 1 << 47)


def test_an_announcement_is_read_back():
    assert announcement_of(announced(WHERE)) == WHERE


@pytest.mark.parametrize("said", [b"", b"\xff", b"\x93\xa1x\xa1y\xff", announced(WHERE)[:-1], b"\x93\xa1x\xa1y\xa1z"])
def test_what_is_no_announcement_is_none(said):
    assert announcement_of(said) is None


def test_what_another_engine_offers_is_not_read(runtime_dir):
    counts: list[tuple[str, int]] = []
    config = VCacheConfig(runtime_dir=str(runtime_dir), transfer={"remote": "mooncake"})
    segments = RemoteSegments(config, lambda name, amount: counts.append((name, amount)))
    said = announced(Announcement("nixl", "10.0.0.1:15000", 4096))
    info = SegmentInfo(1, bytes(16), 1, Tier.DRAM, b"x" * 16, "cpu:0", 1 << 20, b"", "", said)
    assert segments.use([info]) == {}
    segments.close()
    assert counts == [], "nobody failed: it was not even tried"


def test_what_the_readers_engine_raised_is_what_is_said(runtime_dir):
    config = VCacheConfig(runtime_dir=str(runtime_dir), transfer={"remote": "mooncake"})
    setup = engine_setup(config)
    staging = os.memfd_create("staging")
    os.ftruncate(staging, 1 << 20)
    module, environment = "tests.remote.failing_reading_process", engine_environment(config, setup)
    companion = Companion(module, ReadFor(setup, 1 << 20), DECODER, fds=(staging,), environment=environment)
    try:
        with pytest.raises(LinkClosedError, match="ibv_reg_mr: cannot allocate memory"):
            companion.ready(60)
    finally:
        companion.kill()
        os.close(staging)


def test_a_name_that_takes_long_to_resolve_or_cannot_be_holds_up_nobody(runtime_dir, monkeypatch, caplog):
    config = VCacheConfig(runtime_dir=str(runtime_dir), transfer={"remote": "mooncake"})
    memory = allocate(config, RuntimeDir(config.runtime_path), bytes(16), 1 << 20, device="cpu:0")
    resolving, is_resolved = [], threading.Event()

    def resolved(config: VCacheConfig) -> EngineSetup:
        resolving.append(threading.current_thread())
        assert is_resolved.wait(60)
        if len(resolving) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return engine_setup(config)

    monkeypatch.setattr("vcache.remote.offer.engine_setup", resolved)
    monkeypatch.setattr("vcache.remote.offer.RESTART_S", 0.0)
    offer = open_offer(config, memory)
    try:
        until(lambda: offer.announcement() == b"" and bool(resolving), "it is being resolved")
        assert offer.announcement() == b""
        assert threading.current_thread() not in resolving
        assert len(resolving) == 1
        is_resolved.set()
        until(lambda: offer.announcement() != b"", "the next attempt does better")
        assert "Temporary failure in name resolution" in caplog.text
    finally:
        is_resolved.set()
        offer.close()
        memory.close()


class OnAGpu(NamedTuple):
    """As much as is looked at of memory that cannot be offered."""

    device: str = "GPU-2d0a2bb2-6ab8-4c5d-0000-000000000000"


def test_a_gpus_segment_is_not_offered_by_a_build_that_cannot_read_it(runtime_dir, caplog):
    if reads_gpu_memory():
        pytest.skip("this Mooncake was built with CUDA")
    config = VCacheConfig(runtime_dir=str(runtime_dir), transfer={"remote": "mooncake"})
    assert open_offer(config, OnAGpu()) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the segment on GPU-2d0a2bb2-6ab8-4c5d-0000-000000000000 is not offered to other hosts")
    assert "built without CUDA" in line


def test_a_build_with_cuda_is_known_by_what_it_links(tmp_path):
    library = tmp_path / "engine.so"
    library.write_bytes(b"\x7fELF...libstdc++.so.6\0libcudart.so.12\0libc.so.6\0")
    assert links_cuda(library)
    library.write_bytes(b"\x7fELF...libstdc++.so.6\0cuda:\0libc.so.6\0")
    assert not links_cuda(library)


@pytest.mark.cuda
def test_a_gpus_segment_is_announced_or_the_log_says_why_not(runtime_dir, caplog):
    config = VCacheConfig(runtime_dir=str(runtime_dir), transfer={"remote": "mooncake"})
    memory = allocate(config, RuntimeDir(config.runtime_path), bytes(16), 4 << 20, device="cuda:0")
    offer = open_offer(config, memory)
    try:
        until(
            lambda: (offer is not None and offer.announcement()) or "is not offered to other hosts" in caplog.text,
            "an announcement, or a reason",
        )
    finally:
        if offer is not None:
            offer.close()
        memory.close()


def test_rdma_needs_devices():
    with pytest.raises(ConfigError, match=r"transfer\.mooncake\.devices"):
        VCacheConfig(transfer={"remote": "mooncake", "mooncake": {"protocol": "rdma"}})
