"""A plain worker of the demo: stores Llama-8B-shaped KV with known bytes, or loads it and compares every byte.

Run as ``python -m vcache.demo.kv_worker SPEC.json --report-fd=N``. Each round is timed in turns with ``torch.Tensor.copy_`` of
as many bytes between two plain tensors, with the same number of threads, so that their ratio means something on any machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from vcache.config import VCacheConfig
from vcache.demo.messages import Reporter
from vcache.demo.specs import HEAD_SIZE, HEADS, LAYERS, TOKEN_BYTES, PlainOutcome, PlainSpec
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec

#: What blocks hold that nothing was loaded into.
UNTOUCHED: Final = 0xA5
_SEED: Final = 20_261_122


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

    def slot_mapping(self) -> npt.NDArray[np.int64]:
        """The slot of each token."""
        starts = self.block_ids.astype(np.int64)[:, None] * self.block_size
        return (starts + np.arange(self.block_size)).ravel()

    def fill(self) -> None:
        """Writes each block's known bytes."""
        for position, block in enumerate(self.block_ids.tolist()):
            self._bytes[:, block] = self._known(position)

    def wipe(self) -> None:
        self._bytes.fill_(UNTOUCHED)

    def wrong_bytes(self) -> int:
        """Bytes that are not what ``fill`` would write, or not untouched where it writes nothing."""
        wrong = 0
        expected = torch.full_like(self._bytes[:, 0], UNTOUCHED)
        positions = {block: position for position, block in enumerate(self.block_ids.tolist())}
        for block in range(self.num_blocks):
            known = self._known(positions[block]) if block in positions else expected
            if not torch.equal(self._bytes[:, block], known):
                wrong += int((self._bytes[:, block] != known).sum())
        return wrong

    def _known(self, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_SEED + position)
        words = torch.empty(LAYERS * self._block_bytes // 8, dtype=torch.int64)
        words.random_(generator=generator)
        return words.view(torch.uint8).view(LAYERS, self._block_bytes).to(self._bytes.device)


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


def run_worker(spec: PlainSpec, config: VCacheConfig, reporter: Reporter) -> PlainOutcome:
    """Moves the KV ``rounds`` times; the last round's bytes stay in the pool, and are compared when they were loaded."""
    device = torch.device(spec.device if spec.device.startswith("cuda") else "cpu")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    stores = spec.task == "store"
    reporter.stage("filling the KV tensors" if stores else "making KV tensors")
    memory = KVMemory(spec.tokens, config.block_size, device=device, seed=1 if stores else 2)
    copy = _plain_copy(spec.tokens * TOKEN_BYTES, device)
    tokens = np.random.default_rng(_SEED).integers(0, 100_000, spec.tokens)
    slots = memory.slot_mapping()
    if stores:
        memory.fill()
    seconds, copy_seconds = [], []
    with VCacheEngine(config, model=plain_model(config), device=spec.device) as engine:
        engine.register_kv_caches(memory.tensors)
        for number in range(spec.rounds):
            reporter.stage(f"{spec.task}, round {number + 1} of {spec.rounds}")
            copy_seconds.append(_timed(copy, device))
            if stores:
                if number:
                    engine.remove_keys(engine.keys_of(tokens))
                seconds.append(_timed(lambda: engine.store(tokens, slot_mapping=slots), device))
            else:
                memory.wipe()
                seconds.append(_timed(lambda: engine.retrieve(tokens, slot_mapping=slots), device))
        moved = engine.lookup(tokens) if stores else int(engine.retrieve(tokens, slot_mapping=slots).sum())
    reporter.stage("comparing every byte")
    return PlainOutcome(
        tokens=moved,
        nbytes=spec.tokens * TOKEN_BYTES,
        seconds=seconds,
        copy_seconds=copy_seconds,
        threads=threads,
        wrong_bytes=memory.wrong_bytes(),
    )


def _plain_copy(nbytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)  # both written once: no page fault is timed
    return lambda: target.copy_(source)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    spec = msgspec.json.decode(arguments.spec.read_bytes(), type=PlainSpec)
    reporter = Reporter(arguments.report_fd)
    reporter.result(msgspec.to_builtins(run_worker(spec, VCacheConfig.load(), reporter)))


if __name__ == "__main__":
    main()
