"""Bad arguments: each is a ``ValueError`` that names the argument and what is wrong, before anything is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.kv import BLOCK, CHUNK, model_of, new_tensors, slots_of
from tests.test_keys_bad_input import BAD_TOKENS
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.errors import CapacityError, ConfigError
from vcache.paged_kv import PagedKV

TOKENS = list(range(2 * CHUNK))
BLOCKS = [3, 1, 2, 0]
SLOTS = slots_of(BLOCKS)


def changed(index, value):
    slots = SLOTS.clone()
    slots[index] = value
    return slots


@pytest.fixture
def engine(runtime_dir):
    """Arguments are looked at before the pool is, so none is needed."""
    config = VCacheConfig(client={"connect_timeout": "10ms"})
    with VCacheEngine(config, model=model_of(), kv_caches=new_tensors(8)) as engine:
        yield engine


@pytest.mark.parametrize(("tokens", "said"), BAD_TOKENS)
def test_bad_tokens(engine, tokens, said):
    slots = {"slot_mapping": SLOTS}
    for call, arguments in ((engine.lookup, {}), (engine.keys_of, {}), (engine.store, slots), (engine.retrieve, slots)):
        with pytest.raises(ValueError, match=f"^tokens .*{said}"):
            call(tokens, **arguments)


BAD = [
    ({"mask": torch.ones(15, dtype=torch.bool)}, "mask must have one value for each of 16 tokens"),
    ({"mask": torch.ones(16, dtype=torch.int32)}, "mask must be bool, got torch.int32"),
    ({"mask": torch.ones(16, dtype=torch.bool, device="meta")}, "mask must be in host memory"),
    ({"mask": torch.arange(16) < 8}, "mask must be false on a leading run only"),
    ({"mask": torch.arange(16) >= 4}, "mask must be false on a multiple of 8"),
    ({"slot_mapping": None}, "slot_mapping must be given"),
    ({"slot_mapping": SLOTS[:-1]}, "slot_mapping must have one slot for each of 16 tokens"),
    ({"slot_mapping": SLOTS.view(4, 4)}, "slot_mapping must have one slot .* shape"),
    ({"slot_mapping": SLOTS.float()}, "slot_mapping must be integers, got torch.float32"),
    ({"slot_mapping": SLOTS.bool()}, "slot_mapping must be integers, got torch.bool"),
    ({"slot_mapping": SLOTS.numpy().astype(float)}, "slot_mapping must be integers, got float64"),
    ({"slot_mapping": SLOTS.to("meta")}, "slot_mapping must be in host memory or on cpu, is on meta"),
    ({"slot_mapping": "slots"}, "slot_mapping must have one slot"),
    ({"slot_mapping": changed(3, 8 * BLOCK)}, r"slot_mapping\[3\] is 32, there are slots 0 to 31"),
    ({"slot_mapping": changed(5, -1)}, r"slot_mapping\[5\] is -1"),
    ({"slot_mapping": SLOTS + 1}, r"slot_mapping\[0\] is 13, not block-aligned"),
    ({"slot_mapping": changed(6, 9)}, r"slot_mapping\[6\] is 9, not block-aligned"),
    ({"slot_mapping": SLOTS.flip(0)}, r"slot_mapping\[0\] is .* not block-aligned"),
    ({"mask": torch.arange(16) >= 8, "slot_mapping": changed(9, 0)}, r"slot_mapping\[9\] is 0, not block-aligned"),
    ({"kvcaches": {}}, "kvcaches is empty"),
    ({"kvcaches": "kv"}, "kvcaches must be"),
    ({"kvcaches": new_tensors(8, layers=2)}, "kvcaches holds 2 layers"),
    ({"salt": 3}, "salt must be a str"),
    ({"pin": -1}, "pin must be seconds"),
    ({"pin": "long"}, "pin must be seconds"),
    ({"extra_keys": [3]}, "extra_keys must hold str or bytes"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_arguments_of_store_and_retrieve(engine, arguments, said):
    for call in (engine.store, engine.retrieve):
        with pytest.raises(ValueError, match=said):
            call(TOKENS, **{"slot_mapping": SLOTS, **arguments})


def test_slots_of_tokens_beyond_the_last_chunk_must_exist_too(engine):
    slots = torch.cat([SLOTS, torch.tensor([900])])
    with pytest.raises(ValueError, match=r"slot_mapping\[16\] is 900"):
        engine.store([*TOKENS, 1], slot_mapping=slots)


def test_padding_is_refused_only_where_it_would_be_used(engine):
    engine.retrieve(TOKENS, torch.arange(16) >= 8, slot_mapping=torch.cat([torch.full((8,), -1), SLOTS[8:]]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"offset": -1}, "offset must be a whole number from 0 to the 16 tokens"),
        ({"offset": 17}, "offset must be a whole number"),
        ({"offset": 8.0}, "offset must be a whole number"),
        ({"offset": True}, "offset must be a whole number"),
        ({"offset": 4}, "offset must be a multiple of 8"),
        ({"offset": 8}, "slot_mapping must have one slot for each of 8 tokens"),
        ({"offset": 12, "mask": torch.arange(16) >= 8, "slot_mapping": SLOTS[12:]}, "offset is 12, but by the mask"),
    ],
)
def test_bad_offsets(engine, arguments, said):
    with pytest.raises(ValueError, match=said):
        engine.store(TOKENS, **{"slot_mapping": SLOTS, **arguments})


def test_a_load_into_one_block_twice(engine):
    with pytest.raises(ValueError, match="slot_mapping names block 3 twice"):
        engine.retrieve(TOKENS, slot_mapping=slots_of([3, 1, 2, 3]))


@pytest.mark.parametrize("key", ["", "vc1-xyz", b"short", 5, None, bytes(17)])
def test_bad_keys_for_contains(engine, key):
    with pytest.raises(ValueError, match="key"):
        engine.contains(key)


@pytest.mark.parametrize(
    ("keys", "block_ids", "said"),
    [
        (b"0123456789abcdef", [[0, 1]], "keys must be a sequence of chunk keys"),
        ([b"short"], [[0, 1]], "keys must hold chunk keys"),
        ([bytes(16)], [[0, 1, 2]], "block_ids must be integers, 2 for each of 1 keys"),
        ([bytes(16)], [[0.0, 1.0]], "block_ids must be integers"),
        ([bytes(16)], [[0, 8]], "block_ids must be from 0 to 7"),
        ([bytes(16)], [[-2, 0]], "block_ids must be from 0 to 7"),
    ],
)
def test_bad_keys_and_blocks(engine, keys, block_ids, said):
    for call in (engine.begin_store, engine.begin_retrieve):
        with pytest.raises(ValueError, match=said):
            call(keys, block_ids)


def test_a_bad_parent_and_a_bad_lease(engine):
    with pytest.raises(ValueError, match="parent must be a chunk key"):
        engine.begin_store([bytes(16)], [[0, 1]], parent=b"x")
    with pytest.raises(ValueError, match="lease_s must be seconds"):
        engine.lookup_keys([bytes(16)], lease_s=-1)


def test_nothing_was_stored_by_any_of_them(pool, open_engine):
    engine = open_engine(pool, kv_caches=new_tensors(8))
    calls = [(TOKENS, arguments) for arguments, _ in BAD] + [(tokens, {}) for tokens, _ in BAD_TOKENS]
    for tokens, arguments in calls:
        with pytest.raises(ValueError):  # noqa: PT011 - which one is told above
            engine.store(tokens, **{"slot_mapping": SLOTS, **arguments})
    stats = engine.get_stats()
    assert (stats["stored"], stats["server_entries"], stats["server_reservations"]) == (0, 0, 0)


def like(tensor=None, *, layers=3, **named):
    tensors = new_tensors(8, layers=layers)
    if tensor is not None:
        tensors["layer.1"] = tensor
    return tensors


@pytest.mark.parametrize(
    ("kv_caches", "said"),
    [
        (like(layers=4), "kv_caches holds 4 layers .* the model description says 3"),
        (like(torch.zeros(8, 2, 4, 2, 8)), r"kv_caches\['layer.1'\] .*float32.* 512 bytes a block.* 256"),
        (like(torch.zeros(8, 2, 4, 2, 4, dtype=torch.bfloat16)), r"kv_caches\['layer.1'\] .* 128 bytes a block.* 256"),
        (
            like(torch.zeros(8, 2, 4, 2, 8, dtype=torch.float16)),
            r"kv_caches\['layer.1'\] is torch.float16.* torch.bfloat16",
        ),
        (like(torch.zeros(7, 2, 4, 2, 8, dtype=torch.bfloat16)), r"kv_caches\['layer.1'\] .* 7 blocks"),
        (like(torch.zeros(0)), r"kv_caches\['layer.1'\] is empty"),
        (like(torch.eye(4).to_sparse()), r"kv_caches\['layer.1'\] .* a dense tensor"),
        (like("tensor"), r"kv_caches\['layer.1'\] must be a tensor"),
        (like(torch.zeros(8, 2, 4, 2, 8, dtype=torch.bfloat16, device="meta")), r"kv_caches\['layer.1'\] .* meta"),
    ],
)
def test_tensors_that_do_not_fit_the_model(engine, runtime_dir, kv_caches, said):
    with pytest.raises(ValueError, match=said):
        engine.register_kv_caches(kv_caches)
    with pytest.raises(ValueError, match=said):
        VCacheEngine(VCacheConfig(), model=model_of(), kv_caches=kv_caches)
    of_a_call = said.replace("kv_caches", "kvcaches")  # which calls it so
    for call in (engine.store, engine.retrieve):
        with pytest.raises(ValueError, match=of_a_call):
            call(range(8), kvcaches=kv_caches, slot_mapping=range(8))
    assert len(list(runtime_dir.glob("client-*"))) == 1, "only the first engine has joined"


def test_a_mapping_made_elsewhere_is_checked_too(engine):
    with pytest.raises(ValueError, match="kv_caches .* blocks of 2 tokens"):
        engine.register_kv_caches(PagedKV(new_tensors(8), block_size=2))
    with pytest.raises(ValueError, match="kvcaches .* blocks of 2 tokens"):
        engine.store(range(8), kvcaches=PagedKV(new_tensors(8), block_size=2), slot_mapping=range(8))


@pytest.mark.parametrize("pin_s", [-1, True, "long"])
def test_pin_keys_names_its_own_argument(engine, pin_s):
    with pytest.raises(ValueError, match="pin_s must be seconds"):
        engine.pin_keys([bytes(16)], pin_s)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": "meta-llama/Llama-3.1-8B"}, ValueError, "model must be a ModelSpec, got 'meta-llama"),
        ({"role": "cook"}, ValueError, "role must be 'worker' or 'scheduler'"),
        ({"rank": 1}, ValueError, "rank must be from 0 to 0"),
        ({"rank": -1}, ValueError, "rank must be"),
        ({"rank": True}, ValueError, "rank must be"),
        ({"donate": "lots"}, ConfigError, "donate"),
        ({"donate": 0}, ConfigError, "donate"),
        ({"donate": "12KiB"}, CapacityError, "12KiB has no room for data"),
        (
            {"donate": "256KiB", "model": model_of(layers=600)},
            ConfigError,
            "smaller than one chunk: 8 tokens .* 307200 ",
        ),
        ({"device": "tpu"}, ValueError, "device"),
        ({"role": "scheduler", "kv_caches": new_tensors(2)}, ValueError, "kv_caches must not be given"),
        ({"role": "scheduler", "donate": "1MiB"}, ValueError, "donate must not be given"),
    ],
)
def test_a_construction_that_cannot_work_fails_at_once(runtime_dir, arguments, error, said):
    with pytest.raises(error, match=said):
        VCacheEngine(VCacheConfig(), **{"model": model_of(), **arguments})
    assert list(runtime_dir.glob("segment-*")) == []


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_runtime_directory_that_cannot_be_one_is_refused(runtime_dir, role):
    (runtime_dir / "file").touch()
    with pytest.raises(ConfigError, match=r"runtime_dir = '.*/file'"):
        VCacheEngine(VCacheConfig(runtime_dir=f"{runtime_dir}/file"), model=model_of(), role=role)


@pytest.mark.parametrize("config", ["my.yaml", {"chunk_size": 8}])
def test_a_configuration_that_is_none_is_refused(config):
    with pytest.raises(ValueError, match=r"config must be a VCacheConfig .* got .*(my.yaml|chunk_size)"):
        VCacheEngine(config, model=model_of())


def test_a_configuration_that_contradicts_the_model_is_refused(runtime_dir):
    with pytest.raises(ConfigError, match=r"chunk_size = 512 \(from argument\): the model's description says 8"):
        VCacheEngine(VCacheConfig(chunk_size=512), model=model_of())


@pytest.mark.parametrize("timeout_s", ["soon", -1, float("nan"), None])
def test_a_wait_that_is_no_time_ends_nothing(engine, timeout_s):
    for call in (engine.flush, engine.close):
        with pytest.raises(ValueError, match="^timeout_s must be seconds from 0"):
            call(timeout_s)
    engine.store(TOKENS, slot_mapping=SLOTS)


def test_a_scheduler_moves_no_chunks(runtime_dir):
    config = VCacheConfig(client={"connect_timeout": "10ms"})
    with VCacheEngine(config, model=model_of(), role="scheduler") as engine:
        for call in (engine.store, engine.retrieve):
            with pytest.raises(ValueError, match="needs role='worker'"):
                call(TOKENS, kvcaches=new_tensors(8), slot_mapping=SLOTS)
        with pytest.raises(ValueError, match="needs role='worker'"):
            engine.register_kv_caches(new_tensors(8))


def test_kv_tensors_are_mapped_once_and_forgotten_with_the_tensors(engine):
    tensors = new_tensors(8)
    mapped = engine._kv.mapped(tensors)
    assert engine._kv.mapped(dict(tensors)) is mapped
    assert engine._kv.mapped(list(tensors.values())) is mapped
    assert engine._kv.mapped(new_tensors(8)) is not mapped
    known = len(engine._kv._known)
    del tensors
    assert len(engine._kv._known) < known


def test_numpy_integers_are_fine_offsets(engine):
    engine.store(TOKENS, slot_mapping=SLOTS[8:], offset=np.int64(8))
