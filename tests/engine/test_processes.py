"""Workers, donors and server in processes of their own: what one stores the others load, byte for byte. On a GPU, too."""

from __future__ import annotations

from tests.engine.conftest import eventually
from tests.engine.kv import CHUNK
from vcache.server_query import fetch_stats

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


def test_a_worker_loads_what_another_stored_in_a_donor_s_segment_even_after_its_death(pool, start_worker, device):
    writer, reader = (start_worker(pool, device=device) for _ in range(2))
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert reader.do("lookup", tokens=TOKENS) == {"hits": 32}
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert writer.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    writer.child.kill()
    assert reader.do("retrieve", tokens=TOKENS, blocks=HERE) == {"loaded": 32, "wrong": []}


def test_a_worker_loads_from_another_worker_s_own_segment(config, server, start_worker, device):
    writer = start_worker(config, donate="2MiB", device=device)
    reader = start_worker(config, device=device)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert writer.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}


def test_two_ranks_make_a_hit_only_together(pool, start_worker, device):
    ranks = [start_worker(pool, rank=rank, ranks=2, device=device) for rank in range(2)]
    assert ranks[0].do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert [rank.do("lookup", tokens=TOKENS)["hits"] for rank in ranks] == [0, 0]
    assert ranks[0].do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 0, "wrong": []}
    assert ranks[1].do("store", tokens=TOKENS[:16], blocks=HERE[:4]) == {"stored": 2}
    for rank in ranks:
        assert rank.do("lookup", tokens=TOKENS) == {"hits": 16}
        assert rank.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 16, "wrong": []}


def test_a_killed_worker_takes_its_own_segment_s_entries_with_it_and_no_others(
    start_server, start_donor, start_worker, device
):
    config, _ = start_server(server={"heartbeat_interval": "100ms", "liveness_timeout": "1s"})
    start_donor(config, device=device)
    own = start_worker(config, donate="2MiB", device=device)
    reader = start_worker(config, device=device)
    assert reader.do("store", tokens=TOKENS, blocks=HERE, salt="reader") == {"stored": 4}
    assert own.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert reader.do("lookup", tokens=TOKENS) == {"hits": 32}
    own.child.kill()
    eventually(lambda: fetch_stats(config, timeout_s=5).sessions == 2, "the dead worker's session is dropped")
    left = {salt: reader.do("retrieve", tokens=TOKENS, blocks=THERE, salt=salt) for salt in ("", "reader")}
    assert all(answer["wrong"] == [] for answer in left.values())
    in_segments = fetch_stats(config, timeout_s=5)
    assert len(in_segments.segments) == 1
    assert sum(answer["loaded"] for answer in left.values()) == in_segments.entries * CHUNK
