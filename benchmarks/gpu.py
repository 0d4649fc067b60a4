"""Copies between an engine's planes and a segment on a GPU: in device time against the device's own copy, in wall time by whole calls.

*Device time* lies between two events of the stream, behind a delay that lets the host get ahead, so that the host's part is not in
it. The segment is of this process, or of another and opened by its handle. Beside both ways stands a trip of the same bytes to
pinned host memory and back: what a block costs that is offloaded to the host and loaded again; and one way of it.

Runs on the host too (``run_on``), with the clock instead of events: that shows that it runs, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, cycle
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_segment import segment_of_another_process
from benchmarks.gpu_stages import stages
from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave, judge
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.errors import UnavailableError
from vcache.keys import ModelSpec
from vcache.paged_kv import PagedKV
from vcache.transfer import gather, scatter

MIB: Final = 1 << 20
BLOCK_SIZE, HEADS, HEAD_SIZE, CHUNK_SIZE = 16, 8, 128, 256
BLOCKS_PER_CHUNK: Final = CHUNK_SIZE // BLOCK_SIZE
#: Layers that make a chunk of so many MiB, with the heads of Llama-3.1-8B in bfloat16 (which has 32).
LAYER_BYTES: Final = 2 * CHUNK_SIZE * HEADS * HEAD_SIZE * 2
#: Consecutive rounds move other bytes, until caches hold none of the first.
BEYOND_CACHES: Final = 512 * MIB
ROUNDS: Final = 21
DELAY_CYCLES: Final = 4_000_000
COPY, STORE, RETRIEVE = "copy_ on the device", "store", "retrieve"
ONE_WAY, ROUND_TRIP = "one way over pinned host memory", "to pinned host memory and back"
COPY_BAR: Final = Bar(0.85, Better.HIGHER)
#: Between GPUs NVLink's own limit would make it about 14.
HOST_BAR: Final = Bar(40, Better.HIGHER)
CALL_BAR: Final = Bar(1.5, Better.LOWER)
JUDGED_MIB, JUDGED_CHUNKS = 32, 8


@dataclass(frozen=True)
class Sizes:
    """What is measured: chunk sizes in MiB, chunks in a copy, tokens in an engine's call."""

    chunk_mib: tuple[int, ...] = (2, 8, 32)
    chunks: tuple[int, ...] = (1, 8, 64)
    tokens: int = 8192
    layers: int = 32
    rotation_bytes: int = BEYOND_CACHES


def run(effort: Effort) -> list[Result]:
    """Everything, on the first GPU. Raises ``UnavailableError`` where there is none."""
    if not torch.cuda.is_available():
        raise UnavailableError("benchmark gpu: torch sees no CUDA device here; `vcache doctor` says why")
    return list(run_on(torch.device("cuda", 0), effort, Sizes()))


def run_on(device: torch.device, effort: Effort, sizes: Sizes) -> Iterator[Result]:
    """GB/s of the copies, microseconds of whole calls, and of the stages that these are made of."""
    largest = max(sizes.rotation_bytes, max(sizes.chunk_mib) * max(sizes.chunks) * MIB)
    with ExitStack() as stack:
        segments = {"": torch.zeros(largest, dtype=torch.uint8, device=device)}
        if device.type == "cuda":
            other = stack.enter_context(segment_of_another_process(largest, device=str(device)))
            segments[", segment of another process"] = other
        for mib in sizes.chunk_mib:
            for chunks in sizes.chunks:
                for is_scattered in (True, False):
                    yield from _copies(device, effort, sizes, mib, chunks, segments, is_scattered=is_scattered)
    yield from _calls(device, effort, sizes)


# --- copies, in device time ---------------------------------------------------------------------------------------


def _copies(
    device: torch.device,
    effort: Effort,
    sizes: Sizes,
    mib: int,
    chunks: int,
    segments: dict[str, torch.Tensor],
    *,
    is_scattered: bool,
) -> Iterator[Result]:
    nbytes = chunks * mib * MIB
    turns = max(1, min(64, sizes.rotation_bytes // nbytes))
    blocks = turns * chunks * BLOCKS_PER_CHUNK
    planes, kv = _random_planes(device, mib * MIB // LAYER_BYTES, 2 * blocks)
    order: npt.NDArray[np.int64] = np.arange(2 * blocks)
    if is_scattered:
        order = np.random.default_rng(0).permutation(order)
    whence, whither = (half.reshape(turns, chunks, BLOCKS_PER_CHUNK) for half in (order[:blocks], order[blocks:]))
    offsets = (np.arange(turns * chunks) * mib * MIB).reshape(turns, chunks)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    plain = planes.view(-1).view(torch.uint8)

    def rotating(act: Callable[[int], object]) -> Callable[[], float]:
        turn = cycle(range(turns))
        return lambda: nbytes / _seconds(device, lambda: act(next(turn))) / 1e9

    def part(turn: int) -> slice:
        return slice(turn * nbytes, (turn + 1) * nbytes)

    def down(turn: int) -> None:
        pinned.copy_(plain[part(turn)], non_blocking=True)

    def up(turn: int) -> None:
        plain[part(turn)].copy_(pinned, non_blocking=True)

    def there_and_back(turn: int) -> None:
        down(turn)
        up(turn)

    def ways_by(segment: torch.Tensor) -> dict[str, dict[str, Callable[[], float]]]:
        return {
            STORE: {
                STORE: rotating(lambda turn: gather(kv, whence[turn], segment, offsets[turn])),
                COPY: rotating(lambda turn: segment[part(turn)].copy_(plain[part(turn)])),
                ONE_WAY: rotating(down),
                ROUND_TRIP: rotating(there_and_back),
            },
            RETRIEVE: {
                RETRIEVE: rotating(lambda turn: scatter(kv, whither[turn], segment, offsets[turn])),
                COPY: rotating(lambda turn: plain[part(turn)].copy_(segment[part(turn)])),
                ONE_WAY: rotating(up),
                ROUND_TRIP: rotating(there_and_back),
            },
        }

    is_judged = mib >= JUDGED_MIB and chunks >= JUDGED_CHUNKS
    for whose, segment in segments.items():
        planes.view(torch.int16).random_()  # what one segment brought back proves nothing of the next
        for turn in range(turns):
            gather(kv, whence[turn], segment, offsets[turn])
            scatter(kv, whither[turn], segment, offsets[turn])
        _verify(planes, whence.ravel(), whither.ravel())
        case = f"{chunks} x {mib} MiB, {'scattered' if is_scattered else 'contiguous'} blocks{whose}"
        for way, contestants in ways_by(segment).items():
            figures = interleave(contestants, rounds=effort.rounds(ROUNDS))
            bars = {way: COPY_BAR} if is_judged else None
            yield from compare(f"gpu: {way}", case, figures, unit="GB/s", against=COPY, bars=bars)
            yield judge(f"gpu: {way}", case, figures, way, unit="GB/s", against=ONE_WAY)
            bar = HOST_BAR if is_judged else None
            yield judge(f"gpu: {way}", case, figures, way, unit="GB/s", against=ROUND_TRIP, bar=bar)


def _random_planes(device: torch.device, layers: int, blocks: int) -> tuple[torch.Tensor, PagedKV]:
    """KV as FlashAttention keeps it: of each layer K and V, ``[layers, 2, blocks, block size, heads, head size]``."""
    shape = (layers, 2, blocks, BLOCK_SIZE, HEADS, HEAD_SIZE)
    planes = torch.empty(shape, dtype=torch.bfloat16, device=device)
    planes.view(torch.int16).random_()
    return planes, PagedKV(list(planes.unbind(0)), block_size=BLOCK_SIZE, num_blocks=blocks)


def _verify(planes: torch.Tensor, whence: npt.NDArray[np.int64], whither: npt.NDArray[np.int64]) -> None:
    for plane in planes.view(torch.int16):  # as bits: some are no numbers
        if not torch.equal(plane[:, whence], plane[:, whither]):
            raise RuntimeError("gpu: what was loaded is not what was stored")


def _seconds(device: torch.device, act: Callable[[], object]) -> float:
    """Time on the device of what ``act`` enqueues; on the host the time it takes."""
    if device.type == "cpu":
        begin = time.perf_counter()
        act()
        return time.perf_counter() - begin
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
    begun.record()
    act()
    ended.record()
    ended.synchronize()
    milliseconds: float = begun.elapsed_time(ended)
    return milliseconds / 1e3


# --- whole calls, in wall time ------------------------------------------------------------------------------------


def _calls(device: torch.device, effort: Effort, sizes: Sizes) -> Iterator[Result]:
    """An engine's store and retrieve, beside the bare copy of the same bytes; then of one chunk."""
    chunks = sizes.tokens // CHUNK_SIZE
    nbytes = chunks * sizes.layers * LAYER_BYTES
    model = ModelSpec(
        model="benchmark on a GPU",
        dtype="bfloat16",
        num_layers=sizes.layers,
        num_kv_heads=HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        chunk_size=CHUNK_SIZE,
    )
    _, kv = _random_planes(device, sizes.layers, 2 * chunks * BLOCKS_PER_CHUNK)
    order = np.random.default_rng(0).permutation(2 * chunks * BLOCKS_PER_CHUNK)
    bare = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    with Stage() as stage:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
        start_pool(stage, config, [Donation(str(device), 3 * nbytes + 64 * MIB)])
        with VCacheEngine(config, model=model, device=device, kv_caches=kv) as engine:
            for many in dict.fromkeys((chunks, 1)):
                whence, whither = (ids[: many * BLOCKS_PER_CHUNK] for ids in np.split(order, 2))
                yield from _call(engine, kv, bare, many, whence, whither, effort)
                yield from stages(engine, device, many, whence, whither, rounds=effort.rounds(ROUNDS))


def _call(
    engine: VCacheEngine,
    kv: PagedKV,
    bare: torch.Tensor,
    chunks: int,
    whence: npt.NDArray[np.int64],
    whither: npt.NDArray[np.int64],
    effort: Effort,
) -> Iterator[Result]:
    tokens = torch.arange(chunks * CHUNK_SIZE)
    into, out_of = (
        torch.from_numpy((ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()) for ids in (whence, whither)
    )
    offsets = np.arange(chunks) * (len(bare) // chunks)
    numbers = count()

    def timed(act: Callable[[], object]) -> float:
        _settle(bare.device)
        begin = time.perf_counter()
        act()
        _settle(bare.device)
        return (time.perf_counter() - begin) * 1e6

    def store() -> float:
        salt = f"round {next(numbers)}"
        microseconds = timed(lambda: engine.store(tokens, slot_mapping=into, salt=salt))
        if engine.clear(salt=salt) != chunks:
            raise RuntimeError("gpu: not every chunk was stored")
        return microseconds

    def retrieve() -> float:
        loaded: list[torch.Tensor] = []
        microseconds = timed(lambda: loaded.append(engine.retrieve(tokens, slot_mapping=out_of)))
        if not loaded[0].all():
            raise RuntimeError("gpu: not every chunk was loaded")
        return microseconds

    ids = [half.reshape(chunks, BLOCKS_PER_CHUNK) for half in (whence, whither)]
    engine.store(tokens, slot_mapping=into)
    engine.flush()
    ways = {
        STORE: (store, lambda: timed(lambda: gather(kv, ids[0], bare, offsets))),
        RETRIEVE: (retrieve, lambda: timed(lambda: scatter(kv, ids[1], bare, offsets))),
    }
    for way, (whole, kernel) in ways.items():
        figures = interleave({way: whole, "the copy alone": kernel}, rounds=effort.rounds(ROUNDS))
        bars = {way: CALL_BAR} if way == RETRIEVE and chunks > 1 else None
        case = f"{len(tokens):,} tokens, {kv.payload_bytes(BLOCKS_PER_CHUNK) * chunks // MIB} MiB"
        yield from compare(f"gpu: engine's {way}", case, figures, unit="us", against="the copy alone", bars=bars)
    engine.clear()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
