"""A worker of a chaos run: threads that store, read, remove and clear at random, and look at every byte they are served.

``python -m tests.chaos.worker BOARD INDEX WORKERS SEED`` works until it is told "pause" on stdin, then answers "probe" (store
something and read it back) and "exit". Prints WRONG and ends with status 3 when the pool serves what it must not; ends with
a traceback when the pool raises.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

from tests.chaos.board import SLOTS, Board, Count
from tests.chaos.runs import CONTENDED, Run, payload
from vcache import log
from vcache.config import VCacheConfig
from vcache.pool.client import PoolClient
from vcache.pool.reading import begin_read
from vcache.pool.writing import begin_write

THREADS: Final = 2  # of each worker
PROBES: Final = 200
_RECENT: Final = 4  # versions back that are still read and removed


class Thread(threading.Thread):
    """One thread's work. It is the only one that stores or removes the versions of its slots."""

    def __init__(self, client: PoolClient, board: Board, index: int, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.board = board
        self.index = index
        self.rng = rng
        self.slots = range(index * SLOTS, (index + 1) * SLOTS)
        self.stopping = threading.Event()

    def run(self) -> None:
        acts = [self.store] * 6 + [self.read] * 8 + [self.remove] * 3 + [self.look] * 2 + [self.clear, self.hold]
        try:
            while not self.stopping.is_set():
                self.rng.choice(acts)()
                self.pause(0.002)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(4)

    def pause(self, most_s: float) -> None:
        """Leaves the others a turn, and the monkey a moment to strike; now and then for longer than any deadline."""
        if self.rng.random() < 0.02:
            most_s = 1.0
        self.stopping.wait(self.rng.uniform(0, most_s))

    # --- what it does ---------------------------------------------------------------------------------------------

    def any_run(self) -> Run:
        """A run that somebody may have stored: one of all workers', or a recent version of any slot."""
        if self.rng.random() < 0.3:
            return Run(-1, self.rng.randrange(CONTENDED))
        return self.recent(self.rng.randrange(self.board.slots))

    def recent(self, slot: int) -> Run:
        return Run(slot, max(0, self.board.version(slot) - self.rng.randrange(_RECENT)))

    def store(self) -> None:
        if self.rng.random() < 0.4:
            self.write(Run(-1, self.rng.randrange(CONTENDED)))
        else:
            slot = self.rng.choice(self.slots)
            self.write(Run(slot, self.board.next_version(slot)))

    def write(self, run: Run) -> int:
        """Chunks stored whole."""
        stored = [self.write_rank(run, rank) for rank in range(run.ranks)]
        self.board.add(self.index, Count.STORED, min(stored))
        self.board.add(self.index, Count.UNWRITTEN, run.length - min(stored))
        return min(stored)

    def write_rank(self, run: Run, rank: int) -> int:
        keys, rng = run.keys, self.rng
        write = begin_write(
            self.client,
            keys,
            parent=b"",
            rank=rank,
            ranks=run.ranks,
            nbytes=run.nbytes,
            tokens=256,
            tenant=1 + self.index if run.slot >= 0 else 0,
            ttl_s=1 if run.slot < 0 and rng.random() < 0.1 else 0,
            pin_s=0.2 if rng.random() < 0.1 else 0.0,
        )
        self.pause(0.01)

        def copy_in(segment, chunks, offsets):
            for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
                data = payload(keys[write.granted[chunk]], rank, run.nbytes)
                half = run.nbytes // 2
                to = segment.memory.address + offset
                ctypes.memmove(to, data.ctypes.data, half)
                self.pause(0.01)
                ctypes.memmove(to + half, data.ctypes.data + half, run.nbytes - half)

        if rng.random() < 0.05:
            write.abort()
            return 0
        write.copy_with(copy_in)
        self.pause(0.01)
        return write.complete()

    def read(self) -> None:
        run = self.any_run()
        self.read_run(run, self.rng.randrange(run.ranks))

    def read_run(self, run: Run, rank: int) -> int:
        """Chunks read, each of them whole and right. Ends the process for one that is not."""
        keys = run.keys
        removed = self.removed(run)
        read = begin_read(self.client, keys, rank)
        copied: dict[int, bytes] = {}

        def copy_out(segment, chunks, offsets):
            for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
                nbytes = int(read.placements["nbytes"][chunk])
                half = nbytes // 2
                at = segment.memory.address + offset
                first = ctypes.string_at(at, half)
                self.pause(0.01)
                copied[chunk] = first + ctypes.string_at(at + half, nbytes - half)

        self.pause(0.01)
        read.copy_with(copy_out)
        self.pause(0.01)
        valid = read.complete()
        for chunk in range(valid):
            if removed[chunk]:
                wrong(f"chunk {chunk} of {run} was read, and had been removed before")
            expected = payload(keys[chunk], rank, run.nbytes)
            if len(copied[chunk]) != run.nbytes or not np.array_equal(
                np.frombuffer(copied[chunk], dtype=np.uint8), expected
            ):
                wrong(f"WRONG BYTES in chunk {chunk} of {run}, rank {rank}")
        self.board.add(self.index, Count.VERIFIED, valid)
        self.board.add(self.index, Count.MISSED, run.length - valid)
        return valid

    def look(self) -> None:
        run = self.any_run()
        removed = self.removed(run)
        lease_s = self.rng.choice([0.0, 0.3])
        hits = self.client.lookup(b"".join(run.keys), lease_s)
        if any(removed[: hits.hits]):
            wrong(f"{hits.hits} chunks of {run} were found, some had been removed before")
        if self.rng.random() < 0.7:
            self.client.release(hits.lease)

    def removed(self, run: Run) -> list[bool]:
        """Which chunks were removed before now, for good."""
        return [run.slot >= 0 and self.board.is_removed(run.slot, run.version, at) for at in range(run.length)]

    def remove(self) -> None:
        run = Run(-1, self.rng.randrange(CONTENDED))
        if self.rng.random() < 0.8:
            run = self.recent(self.rng.choice(self.slots))
        chunks = list(range(run.length))
        if self.rng.random() < 0.6:
            chunks = [self.rng.choice(chunks)]
        count = self.client.remove(b"".join(run.keys[chunk] for chunk in chunks))
        if run.slot >= 0 and count == len(chunks):
            self.say_removed((run, chunk) for chunk in chunks)

    def say_removed(self, chunks) -> None:
        for run, chunk in chunks:
            self.board.mark_removed(run.slot, run.version, chunk)
            self.board.add(self.index, Count.REMOVED, 1)

    def clear(self) -> None:
        """What the server had when it was asked, and the term is still the same, is gone for good."""
        if self.rng.random() < 0.7:
            return
        term = self.client.term
        seen = []
        for slot in self.slots:
            run = self.recent(slot)
            hits = self.client.lookup(b"".join(run.keys)).hits
            seen += [(run, chunk) for chunk in range(hits)]
        if self.client.clear(None if self.rng.random() < 0.3 else 1 + self.index) and self.client.term == term:
            self.say_removed(seen)

    def hold(self) -> None:
        keys = b"".join(self.any_run().keys)
        self.rng.choice([self.client.touch, self.client.unpin, lambda keys: self.client.pin(keys, 0.5)])(keys)

    def probe(self) -> None:
        """Stores something new and reads it back. Waits for nothing but the pool."""
        for _ in range(PROBES):
            slot = self.slots[0]
            run = Run(slot, self.board.next_version(slot))
            if self.write(run) == run.length and self.read_run(run, 0) == run.length:
                print("probed", flush=True)
                return
            self.client.wait_available(1.0)
            time.sleep(0.1)
        print(f"cannot store and read back: {self.client.counters}", flush=True)


def wrong(what: str) -> NoReturn:
    print(f"WRONG: {what}", flush=True)
    print(f"WRONG: {what}", file=sys.stderr, flush=True)
    os._exit(3)


def main(board_path: str, index: str, workers: str, seed: str) -> None:
    config = VCacheConfig()
    log.configure(config.log_level, f"worker {index}")
    board = Board(Path(board_path), int(workers) * THREADS)
    client = PoolClient(config, device="cpu:0", writes=True, name=f"worker {index}")
    first = int(index) * THREADS
    threads = [Thread(client, board, first + at, random.Random(f"{seed} {first + at}")) for at in range(THREADS)]
    print("working", flush=True)
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        if line == "pause\n":
            for thread in threads:
                thread.stopping.set()
            for thread in threads:
                thread.join()
            print("paused", flush=True)
        elif line == "probe\n":
            threads[0].probe()
        elif line == "exit\n":
            break
    client.close()
    print(f"closed: {client.counters}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
