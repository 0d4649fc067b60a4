"""LMCache's own checks and benchmarks over VCache, run as its users run them."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.lmcache.conftest import PATIENT
from tests.pool.payloads import until
from tests.support.processes import REPOSITORY, Child, Processes

pytestmark = pytest.mark.slow

PATIENCE_S = 200.0
L2_ADAPTER = {
    "type": "plugin",
    "module_path": "vcache_lmcache",
    "class_name": "VCacheL2Adapter",
    "adapter_params": {"donate": "256MiB", **PATIENT},
}


def finished(child: Child) -> str:
    """What it printed, once it ended well."""
    status = child.wait(PATIENCE_S)
    child._reader.join()
    assert status == 0, child.report()
    return "\n".join(child.printed)


def test_basic_check_of_the_l2_adapter(server: Child, processes: Processes) -> None:
    check = ["-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter", "--num-keys", "20"]
    said = finished(processes.python(*check, "--kv-dtype", "bfloat16", "--l2-adapter", json.dumps(L2_ADAPTER)))
    rates = re.findall(r"^\| (\w+[ ()\w]*?) +\|.*\| +(\d+)/20 \|", said, re.MULTILINE)
    assert rates == [("LOOKUP (absent)", "20"), ("STORE", "20"), ("LOOKUP (exist)", "20"), ("LOAD", "20")], said


@pytest.mark.parametrize("example", ["lmcache.yaml", "lmcache-allocator.yaml"])
def test_basic_check_of_the_storage_manager(
    server: Child, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    """With the examples' own files, but for the size of the pool and patience."""
    config = yaml.safe_load((REPOSITORY / "examples" / "lmcache" / example).read_text())
    config["extra_config"]["vcache"] = {"donate": "64MiB", **PATIENT}
    path = tmp_path / example
    path.write_text(json.dumps(config))  # JSON is YAML
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    said = finished(
        processes.python("-m", "lmcache.v1.basic_check", "--mode", "test_storage_manager", "--num-keys", "20")
    )
    rates = dict(re.findall(r"^\| (\w+[ ()\w-]*?) +\|.*\| +(\d+)/20 \|", said, re.MULTILINE))
    assert rates == dict.fromkeys(["EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET"], "20"), said


def test_the_l2_benchmark_verifies_every_byte(server: Child, processes: Processes) -> None:
    bench = ["-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", json.dumps(L2_ADAPTER), "--no-skip-verify"]
    said = finished(processes.python(*bench, "--lookup-max-hit-rate", "1.0", "--rounds", "3", "--in-flight", "2"))
    assert said.count("keys data verified OK") and "MISMATCH" not in said, said
    assert re.findall(r"Total success: +(\d+)", said) == ["192"] * 3, said


class MPServer:
    """``lmcache server`` over the adapter, and its benchmark's client."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.port, http, prometheus = (_free_port() for _ in range(3))
        self.url = f"http://127.0.0.1:{http}"
        command = ["-m", "lmcache.cli.main", "server", "--l1-size-gb", "0.2", "--eviction-policy", "LRU"]
        ports = ["--port", str(self.port), "--http-port", str(http), "--prometheus-port", str(prometheus)]
        self.child = processes.python(*command, *ports, "--l2-adapter", json.dumps(L2_ADAPTER))
        until(self._answers, f"an answer\n{self.child.log}", PATIENCE_S)

    def ask(self, path: str, *, method: str = "GET") -> dict[str, object]:
        request = urllib.request.Request(self.url + path, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer: dict[str, object] = json.load(reply)
            return answer

    def checksums(self) -> dict[str, str]:
        """The benchmark's checksum of what was retrieved, by request; it fails on a byte that differs from what it stored."""
        bench = ["-m", "lmcache.cli.main", "bench", "server", "--mode", "cpu", "--transfer-mode", "lmcache_driven"]
        shape = ["--kvcache-shape-spec", "(2,256,16,2,64):float16:4", "--num-blocks", "256", "--num-tokens", "512"]
        where = ["--rpc-url", f"tcp://localhost:{self.port}", "--url", self.url]
        said = finished(
            self._processes.python(*bench, *shape, *where, "--start", "0", "--end", "4", "--interval", "0.05")
        )
        assert "FAIL:                                                 0" in said, said
        return dict(re.findall(r"\[seq (\d)/warm\] CHECKSUM: (\w+)", said))

    def _answers(self) -> bool:
        assert self.child.running, self.child.report()
        try:
            return bool(self.ask("/status"))
        except OSError:
            return False


def test_the_mp_server_finds_in_the_pool_what_left_its_l1(
    runtime_dir: Path, server: Child, processes: Processes
) -> None:
    mp = MPServer(processes)
    stored = mp.checksums()
    assert len(stored) == 4

    def l2() -> dict[str, object]:
        status = mp.ask("/status")["storage_manager"]
        assert isinstance(status, dict)
        (adapter,) = status["l2_adapters"]
        return dict(adapter)

    until(lambda: l2()["known_objects"] == 8, "the store of 8 chunks")
    mp.ask("/cache/clear", method="POST")
    assert mp.checksums() == stored, "the second time every request was found, and read from the pool"
    until(lambda: l2()["locked_keys"] == 0, "the end of all locks")
    listed = mp.ask("/cache/objects?tier=l2")["entries"]
    assert isinstance(listed, list) and len(listed) == 8
    mp.child.stop()
    assert not list(runtime_dir.glob("segment-*")), "its segment was taken back"


def _free_port() -> int:
    """One that was free a moment ago; LMCache cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
