"""Retrieve of what another host stored, judged against the transfer engine's own read of the same bytes.

The two hosts are two runtime directories on one machine, and the network is its loopback interface. The whole way of a call
of ``VCacheEngine`` is timed: hashing, the server's answer, payloads and records through the engine into staging memory,
validation, the copy into the engine's planes. The other contestant is one ``batch_transfer_sync_read`` of the same payloads, from
the same segment, into registered memory: no records, no validation, no copy to where they belong.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec
from vcache.pool.client import PlacementArray, PoolClient
from vcache.protocol import SegmentInfo
from vcache.remote.announcement import announcement_of

CHUNKS: Final = 64
CHUNK_BYTES: Final = 2 << 20
PLANES: Final = 8
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256
TOTAL_BYTES: Final = CHUNKS * CHUNK_BYTES
ROUNDS: Final = 15
PATIENCE_S: Final = 60.0
BAR: Final = Bar(0.8, Better.HIGHER)
RAW, VCACHE = "batch_transfer_sync_read", "VCache"


def run(effort: Effort) -> list[Result]:
    """GB/s of retrieve from another host, beside the engine's raw read."""
    with Stage() as stage:
        endpoint = f"tcp://127.0.0.1:{_free_port()}"
        here, there = (_host(stage, name, endpoint) for name in ("here", "there"))
        start_pool(stage, there, [Donation("cpu:0", 2 * TOTAL_BYTES)])
        return _measure(here, there, effort)


def _measure(here: VCacheConfig, there: VCacheConfig, effort: Effort) -> list[Result]:
    blocks = CHUNKS * CHUNK_SIZE // BLOCK_SIZE
    width = CHUNK_BYTES // PLANES // (CHUNK_SIZE // BLOCK_SIZE) // 2  # of a block in a plane, in bfloat16
    planes = [torch.zeros((2 * blocks, width), dtype=torch.bfloat16) for _ in range(PLANES)]
    for plane in planes:
        plane.view(torch.int16).random_()
    planes = [plane.view(2 * blocks, BLOCK_SIZE, 4, -1) for plane in planes]
    block_ids = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
    slots = torch.from_numpy((block_ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1))
    tokens = torch.arange(CHUNKS * CHUNK_SIZE)
    model = ModelSpec(
        model="benchmark",
        dtype="bfloat16",
        num_layers=PLANES,
        num_kv_heads=4,
        head_size=width // BLOCK_SIZE // 8,  # K and V side by side in a block
        block_size=BLOCK_SIZE,
        chunk_size=CHUNK_SIZE,
    )
    with VCacheEngine(there, model=model, kv_caches=planes) as writer:
        writer.store(tokens, slot_mapping=slots)
    with VCacheEngine(here, model=model, kv_caches=planes) as engine:
        keys = engine.keys_of(tokens)
        before = [plane.clone() for plane in planes]

        def retrieve() -> float:
            start = time.perf_counter()
            loaded = engine.retrieve(tokens, slot_mapping=slots)
            seconds = time.perf_counter() - start
            if not bool(loaded.all()):
                raise RuntimeError("the benchmark's pool lost a chunk")
            return TOTAL_BYTES / seconds / 1e9

        reader = PoolClient(here, device="cpu:0", writes=False)
        try:
            info, placements = _found(reader, b"".join(keys))
            for plane in planes:
                plane.view(torch.int16)[torch.from_numpy(block_ids)] = 0
            retrieve()
            if not all(
                torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(before, planes, strict=True)
            ):
                raise RuntimeError("retrieve did not bring back what store was given")
            contestants = {RAW: _raw(info, placements), VCACHE: retrieve}
            figures = interleave(contestants, rounds=effort.rounds(ROUNDS))
        finally:
            reader.close()
    case = f"{CHUNKS} payloads of 2 MiB, another host over loopback tcp"
    return compare("remote: retrieve", case, figures, unit="GB/s", against=RAW, bars={VCACHE: BAR})


def _found(reader: PoolClient, keys: bytes) -> tuple[SegmentInfo, PlacementArray]:
    """Where the chunks are, once their donor has said how it is read and this process can read it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        acquired = reader.acquire(keys, 0)
        if acquired is not None and len(acquired.placements) == CHUNKS:
            reader.release(acquired.lease)
            (info,) = acquired.infos.values()
            if info.remote and reader.mappings.use_remote([info]):
                return info, acquired.placements
        time.sleep(0.05)
    raise RuntimeError("the other host's chunks were not found")


def _raw(info: SegmentInfo, placements: PlacementArray) -> Callable[[], float]:
    from mooncake.engine import TransferEngine

    where = announcement_of(info.remote)
    assert where is not None, "it was read a moment ago"
    buffer = torch.ones(TOTAL_BYTES, dtype=torch.uint8)
    transfer = TransferEngine()
    if transfer.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") or transfer.register_memory(
        buffer.data_ptr(), TOTAL_BYTES
    ):
        raise RuntimeError("Mooncake's transfer engine does not start")
    targets = [buffer.data_ptr() + index * CHUNK_BYTES for index in range(CHUNKS)]
    sources = [where.address + offset for offset in placements["offset"].tolist()]

    def figure() -> float:
        start = time.perf_counter()
        code = transfer.batch_transfer_sync_read(where.peer, targets, sources, [CHUNK_BYTES] * CHUNKS)
        seconds = time.perf_counter() - start
        if code or not buffer.numel():  # it keeps the buffer for as long as it is read into
            raise RuntimeError(f"the raw read failed (code {code})")
        return TOTAL_BYTES / seconds / 1e9

    return figure


def _host(stage: Stage, name: str, endpoint: str) -> VCacheConfig:
    directory = stage.directory / name
    directory.mkdir(mode=0o700)
    return VCacheConfig(
        runtime_dir=str(directory),
        chunk_size=CHUNK_SIZE,
        block_size=BLOCK_SIZE,
        server={"endpoint": endpoint},
        transfer={"remote": "mooncake", "remote_timeout": "10s"},
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
