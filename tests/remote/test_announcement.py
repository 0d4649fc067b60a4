"""What a donor says of its segment to other hosts: read back as said, and nothing else is believed."""

from __future__ import annotations

import pytest

from vcache.config import VCacheConfig
from vcache.errors import ConfigError
from vcache.protocol import SegmentInfo, Tier
from vcache.remote.announcement import Announcement, announced, announcement_of
from vcache.remote.segments import RemoteSegments

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


def test_rdma_needs_devices():
    with pytest.raises(ConfigError, match=r"transfer\.mooncake\.devices"):
        VCacheConfig(transfer={"remote": "mooncake", "mooncake": {"protocol": "rdma"}})
