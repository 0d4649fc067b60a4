"""One process stores KV on device 0, another loads it on device 1, and every byte is compared.

By pytest, or as a plain script: ``VCACHE_LOG_LEVEL=DEBUG python tests/test_cross_gpu_store_retrieve.py``. Two GPUs where
there are two, one GPU twice, else two host devices. In the log a chunk can be followed by its key from store to retrieve.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from vcache.config import VCacheConfig  # noqa: E402 - as a script it may run without being installed
from vcache.engine import VCacheEngine  # noqa: E402
from vcache.keys import ModelSpec, format_key  # noqa: E402
from vcache.log import configure  # noqa: E402
from vcache.server_query import fetch_stats  # noqa: E402

# The shape of Llama-3.1-8B with a quarter of its layers: 8 MiB a chunk.
MODEL = ModelSpec(
    model="cross-device", dtype="bfloat16", num_layers=8, num_kv_heads=8, head_size=128, block_size=16, chunk_size=256
)
CHUNKS = 8
BLOCKS = 2 * CHUNKS * MODEL.blocks_per_chunk
TOKENS = list(range(CHUNKS * MODEL.chunk_size))
START_TIMEOUT_S = 60.0


def two_devices() -> tuple[str, str]:
    """Two GPUs, one twice, or two host devices."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        return "cuda:0", f"cuda:{min(1, gpus - 1)}"
    return "cpu:0", "cpu:1"


def kv_tensors(device: str) -> dict[str, torch.Tensor]:
    shape = (BLOCKS, 2, MODEL.block_size, MODEL.num_kv_heads, MODEL.head_size)
    return {f"layer.{i}": torch.zeros(shape, dtype=torch.bfloat16, device=device) for i in range(MODEL.num_layers)}


def computed_kv(device: str) -> torch.Tensor:
    """The KV of ``TOKENS``, equal in every process: ``[layers, blocks of the prompt, bytes of a block]``."""
    shape = (MODEL.num_layers, BLOCKS // 2, 2 * MODEL.block_size * MODEL.num_kv_heads * MODEL.head_size * 2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7)).to(device)


def slots_of(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks[:, None] * MODEL.block_size + torch.arange(MODEL.block_size)).flatten()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A KV tensor as ``[blocks, bytes of a block]``."""
    return tensor.view(torch.uint8).view(BLOCKS, -1)


def store_side(device: str) -> None:
    """Stores, says so, and stays until told to end: the segment is this process's."""
    tensors, kv = kv_tensors(device), computed_kv(device)
    blocks = torch.arange(BLOCKS // 2)
    for layer, tensor in enumerate(tensors.values()):
        raw(tensor)[: BLOCKS // 2] = kv[layer]
    with VCacheEngine(VCacheConfig(), model=MODEL, device=device, kv_caches=tensors, donate=2 * kv.numel()) as engine:
        engine.store(TOKENS, slot_mapping=slots_of(blocks))
        stats = engine.get_stats()
        print(
            f"stored {stats['stored']} chunks, {kv.numel() >> 20} MiB, from {device} into its own segment; "
            f"first key {format_key(engine.keys_of(TOKENS)[0])}",
            flush=True,
        )
        sys.stdin.readline()


def load_side(device: str) -> None:
    """Loads into other blocks than the KV was stored from, and compares every byte."""
    tensors, kv = kv_tensors(device), computed_kv(device)
    blocks = torch.arange(BLOCKS // 2).flip(0) + BLOCKS // 2
    with VCacheEngine(VCacheConfig(), model=MODEL, device=device, kv_caches=tensors) as engine:
        hits = engine.lookup(TOKENS)
        loaded = engine.retrieve(TOKENS, slot_mapping=slots_of(blocks))
        stats = engine.get_stats()
    same = all(torch.equal(raw(tensor)[blocks.to(device)], kv[i]) for i, tensor in enumerate(tensors.values()))
    untouched = not any(raw(tensor)[: BLOCKS // 2].any() for tensor in tensors.values())
    print(
        f"found {hits} tokens, loaded {int(loaded.sum())} into {device}: {stats['hits']} chunks; "
        f"bytes {'equal' if same and untouched else 'DIFFER'}",
        flush=True,
    )
    if not (same and untouched and hits == len(TOKENS) and loaded.all()):
        sys.exit(1)


@contextmanager
def process(
    arguments: list[str], environment: dict[str, str], log: IO[bytes] | None
) -> Iterator[subprocess.Popen[str]]:
    """A child that is gone afterwards, whatever happens."""
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()


def run(runtime_dir: Path, say: Callable[[str], None], log: IO[bytes] | None = None) -> None:
    """Server, storing process, loading process. Raises ``AssertionError`` when a byte differs or a process fails."""
    config = VCacheConfig(runtime_dir=str(runtime_dir))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VCACHE_RUNTIME_DIR": str(runtime_dir),
    }
    storing, loading = two_devices()
    this = "tests.test_cross_gpu_store_retrieve"
    with ExitStack() as stack:
        stack.enter_context(process(["-m", "vram_metadata_server"], environment, log))
        stats = fetch_stats(config, timeout_s=START_TIMEOUT_S)
        say(f"metadata server at {config.endpoint}, term {stats.term}")
        storer = stack.enter_context(process(["-m", this, "store", storing], environment, log))
        assert storer.stdout is not None
        line = storer.stdout.readline().strip()
        assert line, f"the storing process failed with status {storer.wait()}"
        say(line)
        started = time.perf_counter()
        loader = stack.enter_context(process(["-m", this, "load", loading], environment, log))
        assert loader.stdout is not None
        say(loader.stdout.readline().strip() or "the loading process printed nothing")
        assert loader.wait() == 0, "the loading process failed"
        say(f"the loading process took {time.perf_counter() - started:.1f} s, most of it to start")


def test_one_process_loads_on_device_1_what_another_stored_on_device_0(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_LOG_LEVEL", "DEBUG")
    lines: list[str] = []
    log = tmp_path / "log"
    with log.open("wb") as file:
        run(runtime_dir, lines.append, file)
    key = next(line for line in lines if "first key" in line).split()[-1]
    followed = [line for line in log.read_text().splitlines() if key in line]
    assert any("vram_metadata_server" in line for line in followed), followed
    assert any("pool.writing: stored" in line for line in followed), followed
    assert any("pool.reading: read" in line for line in followed), followed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", nargs="?", choices=["store", "load"])
    parser.add_argument("device", nargs="?", default="cpu")
    arguments = parser.parse_args()
    if arguments.side:
        configure(VCacheConfig().log_level, f"{arguments.side} {arguments.device}")
        (store_side if arguments.side == "store" else load_side)(arguments.device)
        return
    with tempfile.TemporaryDirectory(prefix="vct-", dir="/dev/shm") as directory:
        run(Path(directory), lambda line: print(line, flush=True))
    print("every byte arrived")


if __name__ == "__main__":
    main()
