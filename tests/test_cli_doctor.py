"""``vcache doctor`` against a real pool, without one, and with stores that are not there."""

from __future__ import annotations

import json
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_cli import vcache
from vcache.config import VCacheConfig
from vcache.doctor import State, gpus, host


def examined(*settings: str, status: int) -> dict[str, list[dict[str, Any]]]:
    """Findings by what they are about."""
    chosen = [part for setting in settings for part in ("--set", setting)]
    done = vcache("doctor", "--json", "--timeout", "30", *chosen, status=status)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(finding["about"], []).append(finding)
    return found


def test_a_pool_that_works_has_no_problems(runtime_dir, processes):
    config = VCacheConfig(runtime_dir=str(runtime_dir))
    processes.server(config)
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "32MiB", config=config)
    donor.expect("donating")
    found = examined(f"runtime_dir={runtime_dir}", status=0)
    assert found["metadata server"][0]["state"] == "ok"
    assert found["segments"][0]["detail"] == "1 serving in dram: 31.9 MiB"
    assert found["runtime directory"][0]["state"] == found["functions in C"][0]["state"] == "ok"
    assert found["store"][0]["state"] == "ok"
    text = vcache("doctor", "--set", f"runtime_dir={runtime_dir}").stdout
    assert "answers at" in text and str(runtime_dir) in text


def test_a_missing_server_is_a_problem_with_its_remedy(runtime_dir):
    done = vcache("doctor", "--json", "--timeout", "0.1", "--set", f"runtime_dir={runtime_dir}", status=1)
    [finding] = [each for each in json.loads(done.stdout) if each["state"] == "problem"]
    assert finding["about"] == "metadata server" and "`vcache server`" in finding["detail"]


def test_stores_that_cannot_be_reached_are_problems(runtime_dir, tmp_path):
    with socket.socket() as nobody:  # bound, and never listens
        nobody.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{nobody.getsockname()[1]}"
        place = f"runtime_dir={runtime_dir}"
        chosen = [part for each in (place, f"store.mooncake.master={master}") for part in ("--set", each)]
        done = vcache("doctor", "--json", "--timeout", "0.1", *chosen, status=1)
    [finding] = [each for each in json.loads(done.stdout) if each["about"] == "store"]
    assert finding["state"] == "problem" and master in finding["detail"] and "vcache mooncake start" in finding["fix"]
    chosen = ["--set", place, "--set", f"store.files.directory={tmp_path}/not/there"]
    done = vcache("doctor", "--json", "--timeout", "0.1", *chosen, status=1)
    [finding] = [each for each in json.loads(done.stdout) if each["about"] == "store"]
    assert finding["state"] == "problem" and f"{tmp_path}/not is no directory" in finding["detail"]


def test_a_directory_of_somebody_else_and_one_on_a_disk_are_told(runtime_dir, tmp_path):
    foreign = tmp_path / "file"
    foreign.write_text("")
    [finding] = list(host.examine(VCacheConfig(runtime_dir=str(foreign))))[:1]
    assert (finding.about, finding.state) == ("runtime directory", State.PROBLEM)
    place = tmp_path / "on-a-disk"
    notes = [each.detail for each in host.examine(VCacheConfig(runtime_dir=str(place))) if each.state is State.NOTE]
    on_a_disk = host._filesystem(place) not in host.MEMORY_FILESYSTEMS
    assert any("not in memory" in note for note in notes) == on_a_disk
    assert host._filesystem(runtime_dir) == "tmpfs"


def test_more_than_there_is_to_donate_is_told(runtime_dir):
    space = os.statvfs(runtime_dir)
    config = VCacheConfig(runtime_dir=str(runtime_dir), segment={"size": space.f_blocks * space.f_frsize * 2})
    [finding] = [each for each in host.examine(config) if each.about == "shared memory"]
    assert finding.state is State.NOTE and "less than segment.size" in finding.detail


@pytest.mark.parametrize(
    ("available", "vendor", "expected"),
    [
        (True, "0x10de", ("driver", State.OK)),
        (False, "0x10de", ("driver", State.PROBLEM)),
        (False, "0x8086", ("GPUs", State.NOTE)),
    ],
)
def test_a_driver_that_shows_no_files_is_a_problem_if_there_is_a_gpu_that_torch_does_not_see(
    tmp_path, monkeypatch, available, vendor, expected
):
    torch = SimpleNamespace(
        __version__="2", version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(is_available=lambda: available)
    )
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "nowhere")
    (tmp_path / "0000:00:01.0").mkdir()
    (tmp_path / "0000:00:01.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path)
    [finding] = gpus._visible(torch)
    assert (finding.about, finding.state) == expected


@pytest.mark.parametrize(("seen", "state"), [(1, State.NOTE), (0, State.PROBLEM)])
@pytest.mark.parametrize(
    ("chosen", "why"), [("0", "CUDA_VISIBLE_DEVICES is '0'"), (None, "the container or the driver")]
)
def test_gpus_that_the_driver_has_and_this_process_does_not_see_are_told(
    tmp_path, monkeypatch, seen, state, chosen, why
):
    cuda = SimpleNamespace(is_available=lambda: seen > 0, device_count=lambda: seen)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    (tmp_path / "version").write_text("NVRM version: some driver\nGCC version: some compiler\n")
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / address).mkdir(parents=True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    driver, hidden, mps = gpus._visible(SimpleNamespace(cuda=cuda))
    assert driver.detail == "NVRM version: some driver"
    assert (hidden.about, hidden.state) == ("hidden GPUs", state)
    assert f"the driver has 2, this process sees {seen}: {why}" in hidden.detail
    assert mps.state is State.NOTE and "a fault of one of its clients ends all of them" in mps.detail


@pytest.mark.parametrize(("name", "state"), [("NVIDIA H100", State.OK), ("NVIDIA H100 MIG 1g.10gb", State.NOTE)])
def test_a_gpu_is_told_with_what_is_free_and_what_a_process_takes(name, state):
    cuda = SimpleNamespace(
        get_device_name=lambda ordinal: name,
        mem_get_info=lambda ordinal: (3 << 30, 8 << 30),
        get_device_properties=lambda ordinal: SimpleNamespace(uuid="its-uuid"),
    )
    torch = SimpleNamespace(cuda=cuda)
    found = gpus._device(torch, 0, 1 << 30)
    assert (found.about, found.state) == ("cuda:0", state)
    assert f"{name}, its-uuid: 3.0 GiB of 8.0 GiB are free; each process that uses it takes about" in found.detail
    assert "a donor of segment.size 1.5 GiB in all" in found.detail
    assert ("MIG instance" in found.fix) == (state is State.NOTE)
    too_much = gpus._device(torch, 0, 3 << 30)
    assert too_much.state is State.NOTE
    assert ("gpu_memory_utilization" in too_much.fix) == (state is State.OK)


@pytest.mark.cuda
def test_a_gpu_is_shared_between_processes(config):
    found = {finding.about: finding for finding in gpus.examine(config, timeout_s=60)}
    assert found["cuda:0"].state is not State.PROBLEM
    ways = [found[f"{kind.name} on cuda:0"] for kind in gpus.KINDS.values()]
    assert any(way.state is State.OK for way in ways), [way.detail for way in ways]
