"""A plain worker of the demo: stores Llama-8B-shaped KV with known bytes, or loads it and compares every byte.

Run as ``python -m vcache.demo.kv_worker SPEC.json --report-fd=N``, with moves to make on standard input. Each round is timed
in turns with ``torch.Tensor.copy_`` of as many bytes between two plain tensors, with the same number of threads, so that
their ratio means something on any machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from vcache.config import VCacheConfig
from vcache.demo.messages import Reporter, requests
from vcache.demo.moved import await_store, moved
from vcache.demo.specs import HEAD_SIZE, HEADS, LAYERS, TOKEN_BYTES, Move, MoveOutcome, WorkerSpec
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec

T = TypeVar("T")

#: What blocks hold that nothing was loaded into.
UNTOUCHED: Final = 0xA5
_SEED: Final = 20_261_122
#: Odd, so that multiples of it differ in every block of every prompt.
_STRIDE: Final = 0x5851_F42D_4C95_7F2D
_PROMPT_BLOCKS: Final = 1 << 32


class KVMemory:
    """KV tensors as vLLM lays them out on a CPU: layers in one storage, ``[num_blocks, heads, block, 2 * head]`` each.

    A prompt's blocks are scattered over it, differently for each ``seed``; an eighth of the blocks is nobody's.
    """

    def __init__(self, tokens: int, block_size: int, *, device: torch.device, seed: int) -> None:
        blocks = tokens // block_size
        self.block_size = block_size
        self.num_blocks = blocks + blocks // 8 + 1
        self._block_bytes = block_size * TOKEN_BYTES // LAYERS
        self._bytes = torch.full(
            (LAYERS, self.num_blocks, self._block_bytes), UNTOUCHED, dtype=torch.uint8, device=device
        )
        shape = (self.num_blocks, HEADS, block_size, 2 * HEAD_SIZE)
        self.tensors = {
            f"layers.{index}": layer.view(torch.bfloat16).view(shape) for index, layer in enumerate(self._bytes)
        }
        self.block_ids = np.random.default_rng(seed).permutation(self.num_blocks)[:blocks]
        words = torch.empty(LAYERS * self._block_bytes // 8, dtype=torch.int64)
        self._random = words.random_(generator=torch.Generator().manual_seed(_SEED)).to(device)

    def slot_mapping(self, tokens: int) -> npt.NDArray[np.int64]:
        """The slot of each of the first ``tokens`` tokens."""
        starts = self.block_ids[: tokens // self.block_size].astype(np.int64)[:, None] * self.block_size
        return (starts + np.arange(self.block_size)).ravel()

    def fill(self, prompt: int) -> None:
        """Writes the known bytes of ``prompt`` into each block that is somebody's."""
        for position, block in enumerate(self.block_ids.tolist()):
            self._bytes[:, block] = self._known(prompt, position)

    def wipe(self) -> None:
        self._bytes.fill_(UNTOUCHED)

    def wrong_bytes(self, prompt: int) -> int:
        """Bytes that are not what ``fill`` would write, or not untouched where it writes nothing."""
        wrong = 0
        expected = torch.full_like(self._bytes[:, 0], UNTOUCHED)
        positions = {block: position for position, block in enumerate(self.block_ids.tolist())}
        for block in range(self.num_blocks):
            known = self._known(prompt, positions[block]) if block in positions else expected
            if not torch.equal(self._bytes[:, block], known):
                wrong += int((self._bytes[:, block] != known).sum())
        return wrong

    def _known(self, prompt: int, position: int) -> torch.Tensor:
        """Random words, each turned into another one by the block's place in the prompt: no two blocks share a word's value."""
        turn = (prompt * _PROMPT_BLOCKS + position) * _STRIDE % (1 << 63)
        return (self._random ^ turn).view(torch.uint8).view(LAYERS, self._block_bytes)


def plain_model(config: VCacheConfig) -> ModelSpec:
    """The shape of Llama 3 8B."""
    return ModelSpec(
        model="vcache-demo/llama-8b-shape",
        dtype="bfloat16",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_size=HEAD_SIZE,
        block_size=config.block_size,
        chunk_size=config.chunk_size,
        kv_layout="HND",
    )


class Worker:
    """One process's KV tensors and its engine."""

    def __init__(self, spec: WorkerSpec, config: VCacheConfig, reporter: Reporter) -> None:
        self._device = torch.device(spec.device if spec.device.startswith("cuda") else "cpu")
        self._threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(self._threads)
        self._reporter = reporter
        reporter.stage("making KV tensors")
        self._memory = KVMemory(spec.tokens, config.block_size, device=self._device, seed=spec.seed)
        self._engine = VCacheEngine(config, model=plain_model(config), device=spec.device)
        self._engine.register_kv_caches(self._memory.tensors)
        await_store(self._engine.get_stats)

    def move(self, move: Move) -> MoveOutcome:
        """Stores or loads, ``rounds`` times. What the last round stored stays; what it loaded is compared."""
        tokens = np.random.default_rng(move.prompt).integers(0, 100_000, move.tokens)
        slots = self._memory.slot_mapping(move.tokens)
        copy = _plain_copy(move.tokens * TOKEN_BYTES, self._device)
        stores = move.task == "store"
        call: Callable[..., torch.Tensor | None] = self._engine.store if stores else self._engine.retrieve
        if stores:
            self._memory.fill(move.prompt)
        done, before = 0, self._engine.get_stats()
        seconds, copy_seconds = [], []
        for number in range(move.rounds):
            self._reporter.stage(f"{move.task}, round {number + 1} of {move.rounds}")
            if not stores:
                self._memory.wipe()
            elif number:
                self._engine.remove_keys(self._engine.keys_of(tokens))
            before = self._engine.get_stats()
            copy_seconds.append(_timed(copy, self._device)[0])
            took, loaded = _timed(lambda: call(tokens, slot_mapping=slots), self._device)
            seconds.append(took)
            if stores:
                self._engine.flush()  # else the next round would compete with what goes to the store below the pool
            done = self._engine.lookup(tokens) if loaded is None else int(loaded.sum())
        self._reporter.stage("comparing every byte")
        return MoveOutcome(
            tokens=done,
            seconds=seconds,
            copy_seconds=copy_seconds,
            threads=self._threads,
            wrong_bytes=self._memory.wrong_bytes(move.prompt),
            moved=moved(before, self._engine.get_stats()),
        )

    def close(self) -> None:
        self._engine.close()


def _plain_copy(nbytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)  # both written once: no page fault is timed
    return lambda: target.copy_(source)


def _timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    spec = msgspec.json.decode(arguments.spec.read_bytes(), type=WorkerSpec)
    reporter = Reporter(arguments.report_fd)
    worker = Worker(spec, VCacheConfig.load(), reporter)
    reporter.result({})
    for request in requests():
        reporter.result(msgspec.to_builtins(worker.move(msgspec.json.decode(request, type=Move))))
    worker.close()


if __name__ == "__main__":
    main()
