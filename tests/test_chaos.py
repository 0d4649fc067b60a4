"""Real processes, killed, suspended and restarted at random while every byte they serve each other is checked.

What must hold whatever happens: never a wrong byte; what was removed does not come back; nothing raises in a client. And
once the monkey has left: everybody finds everybody again, and no byte of any segment is lost for good. A run follows from
its seed, as far as the scheduler lets it; a failure prints the seed and what was done.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.board import Count
from tests.chaos.monkey import SHORT, Monkey, Pool
from tests.support.processes import Processes
from vcache.config import VCacheConfig
from vcache.pool.client import PoolClient
from vcache.pool.runtime_dir import RuntimeDir
from vcache.protocol import SegmentStats


def test_a_pool_survives_a_monkey(runtime_dir: Path, tmp_path: Path, processes: Processes):
    harm_and_check(runtime_dir, tmp_path, processes, seed=1, events=8, donors=2, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_a_larger_pool_survives_a_monkey_for_longer(runtime_dir: Path, tmp_path: Path, processes: Processes, seed: int):
    harm_and_check(runtime_dir, tmp_path, processes, seed=seed, events=40, donors=3, workers=3)


def harm_and_check(
    runtime_dir: Path, logs: Path, processes: Processes, *, seed: int, events: int, **sizes: int
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", seed))
    config = VCacheConfig(runtime_dir=str(runtime_dir), **SHORT)
    pool = Pool(config, processes, logs / "board", **sizes)
    monkey = Monkey(pool, seed)
    try:
        monkey.harm(events)
        check_that_it_works_again(pool)
        check_that_nothing_is_lost(pool)
        check_that_all_end(pool, runtime_dir)
        pool.check_logs()
    except BaseException as error:
        error.add_note("\n".join([*monkey.log, *(child.report()[-3000:] for child in pool.children)]))
        raise
    print(monkey.log, {count.name: pool.board.total(count) for count in Count})


def check_that_it_works_again(pool: Pool) -> None:
    """Server, donors and workers find each other again, and every worker can store and read."""
    pool.until(lambda: serving(pool), "the donors' segments serve, and no others are left")
    shown = (Count.STORED, Count.VERIFIED, Count.REMOVED)
    pool.until(lambda: all(map(pool.board.total, shown)), "the workers have stored, verified and removed something")
    for worker in pool.workers:
        worker.tell("pause")
    for worker in pool.workers:
        worker.expect("paused")
        worker.tell("probe")
        answer = worker.line()
        assert answer == "probed", f"{answer}\n{worker.report()}"
    pool.check()


def serving(pool: Pool) -> list[SegmentStats]:
    """All segments, once they are exactly those of the donors that live, and serve."""
    stats = pool.stats()
    if stats is None or any(segment.state != "serving" for segment in stats.segments):
        return []
    segments = sorted(segment.segment_id for segment in stats.segments)
    return stats.segments if segments == sorted(pool.segment_ids()) else []


def check_that_nothing_is_lost(pool: Pool) -> None:
    """With everything removed, all of every segment is free, for the server and in memory."""
    client = PoolClient(pool.config, device="cpu:0", writes=False, name="checker")

    def is_all_free() -> bool:
        client.clear()
        client.acquire(bytes(16), 0)  # tells of segments that came since, whatever it finds
        stats = pool.stats()
        if stats is None or stats.entries or stats.reservations:
            return False
        segments = serving(pool)
        return bool(segments) and all(is_free(segment) for segment in segments)

    def is_free(told: SegmentStats) -> bool:
        info = client.session.info(told.number)
        use = client.use_segment(info) if info is not None else None
        if use is None:
            return False
        assert told.total_bytes == use.segment.nbytes - use.segment.data_offset
        in_memory = list(use.segment.scan())
        use.release()
        is_whole = told.free_bytes == told.largest_free_bytes == told.total_bytes
        return is_whole and not told.records_used and not in_memory

    try:
        pool.until(is_all_free, "every byte of every segment is free")
    finally:
        client.close()


def check_that_all_end(pool: Pool, runtime_dir: Path) -> None:
    """Everybody ends in good order, and leaves nothing in shared memory, though others of them were killed."""
    for worker in pool.workers:
        worker.tell("exit")
        assert worker.wait() == 0, worker.report()
    for child in [*pool.donors, pool.server]:
        assert child.stop() == 0, child.report()
    RuntimeDir(runtime_dir).sweep()
    assert sorted(path.name for path in runtime_dir.iterdir()) == ["host", "server.sock.lock", "sweep.lock"]
