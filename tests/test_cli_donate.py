"""``vcache donate`` as a process: what it gives, and what it leaves behind however it ends."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from tests.support.processes import PATIENCE_S, Child, Processes
from tests.test_cli import vcache
from vcache.config import VCacheConfig
from vcache.protocol import SegmentStats
from vcache.server_query import fetch_stats

MIB = 1 << 20


def start_donor(processes: Processes, *options: str) -> Child:
    return processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB", *options)


def segments_of(config: VCacheConfig) -> list[SegmentStats]:
    return fetch_stats(config, timeout_s=PATIENCE_S).segments


def until_segments(config: VCacheConfig, count: int) -> list[SegmentStats]:
    """The server's segments once there are so many: it drops a silent donor's by its own clock."""
    deadline = time.monotonic() + PATIENCE_S
    while len(found := segments_of(config)) != count:
        assert time.monotonic() < deadline, f"{len(found)} segments, {count} wanted"
        time.sleep(0.05)
    return found


def segment_files(runtime_dir) -> list[str]:
    return [path.name for path in runtime_dir.glob("segment-*.shm")]


def test_a_donor_gives_a_segment_and_takes_it_back_when_told_to_end(config, server, processes, runtime_dir):
    donor = start_donor(processes, "--label", "shelf")
    line = donor.expect("donating 8.0 MiB of cpu:0")
    [segment] = segments_of(config)
    assert (segment.label, segment.device, segment.tier, segment.state) == ("shelf", "cpu:0", "dram", "serving")
    assert 7 * MIB < segment.total_bytes <= 8 * MIB
    assert segment.segment_id in line
    assert len(segment_files(runtime_dir)) == 1
    assert donor.stop() == 0
    assert donor.expect("took 8.0 MiB of cpu:0 back")
    assert segment_files(runtime_dir) == []
    assert until_segments(config, 0) == []


def test_host_memory_can_stand_in_for_vram(config, server, processes):
    start_donor(processes, "--tier", "vram").expect("donating")
    [segment] = segments_of(config)
    assert (segment.device, segment.tier) == ("cpu:0", "vram")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_a_donor_as_cleanly(config, server, processes, runtime_dir, number):
    donor = start_donor(processes)
    donor.expect("donating")
    donor.popen.send_signal(number)
    assert donor.wait() == 0
    assert segment_files(runtime_dir) == []


def test_a_donor_told_to_outlive_its_terminal_does(config, server, processes):
    donor = processes.start(
        ["nohup", sys.executable, "-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB"]
    )
    donor.expect("donating")
    donor.popen.send_signal(signal.SIGHUP)
    assert donor.stop() == 0
    assert donor.expect("took 8.0 MiB of cpu:0 back")


def test_a_label_with_brackets_is_shown_as_it_is(config, server, processes):
    start_donor(processes, "--label", "[/rack] [1]").expect("donating")
    assert " [/rack] [1] " in vcache("status", "--interval", "0").stdout


def test_a_donor_started_before_the_server_joins_once_there_is_one(config, processes):
    donor = start_donor(processes, "--set", "client.connect_timeout=10ms")
    processes.server(config)
    donor.expect("donating")
    assert len(segments_of(config)) == 1


def test_a_donor_told_to_end_while_there_is_no_server_leaves_nothing(processes, runtime_dir):
    donor = start_donor(processes, "--set", "client.connect_timeout=10ms")
    deadline = time.monotonic() + PATIENCE_S
    while "no metadata server" not in donor.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(segment_files(runtime_dir)) == 1
    assert donor.stop() == 0
    assert segment_files(runtime_dir) == []


def test_a_donor_that_waits_for_a_server_can_be_told_to_end(processes, runtime_dir):
    donor = start_donor(processes, "--set", "client.connect_timeout=1h")
    deadline = time.monotonic() + PATIENCE_S
    while not segment_files(runtime_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert donor.stop() == 0
    assert segment_files(runtime_dir) == []


def test_what_a_killed_donor_leaves_is_removed_by_the_next_one_on_the_host(start_server, processes, runtime_dir):
    config, _ = start_server(server={"heartbeat_interval": "100ms", "liveness_timeout": "1s"})
    killed = start_donor(processes)
    killed.expect("donating")
    left = segment_files(runtime_dir)
    killed.kill()
    assert segment_files(runtime_dir) == left
    start_donor(processes).expect("donating")
    until_segments(config, 1)
    assert set(segment_files(runtime_dir)).isdisjoint(left)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--size", "4TiB"), 1, "a segment of 4TiB was asked for, "),
        (("--size", "8G"), 2, "8GiB"),
        (("--tier", "hbm"), 2, "segment.tier = 'hbm' (from argument)"),
        (("--device", "gpu0"), 2, "is no device; use cuda:0"),
        (("--device", "cpu:\N{ARABIC-INDIC DIGIT THREE}"), 2, "is no device; use cuda:0"),
        (("--label", "a\nb"), 2, "printable characters"),
        (("--label", "x" * 65), 2, "at most 64 printable"),
        (("--device", "cuda:99"), 1, "cuda:99"),
    ],
)
def test_what_cannot_be_given_is_refused_before_anything_exists(processes, runtime_dir, options, status, words):
    donor = start_donor(processes, *options)
    assert donor.wait() == status
    assert words in donor.log.read_text()
    assert segment_files(runtime_dir) == []


def test_a_donor_of_host_memory_loads_no_torch(config, server, processes):
    donor = start_donor(processes)
    donor.expect("donating")
    with open(f"/proc/{donor.pid}/maps") as maps:
        assert "libtorch" not in maps.read()
