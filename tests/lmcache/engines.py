"""A real LMCacheEngine without a serving engine: its connector copies between LMCache's objects and one CPU tensor."""

from __future__ import annotations

from typing import Any

import torch
from lmcache.v1.cache_engine import LMCacheEngine, LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata
from vcache_lmcache import VCacheBackend

from tests.lmcache.conftest import PATIENT

LAYERS, HEADS, HEAD_SIZE, CHUNK_TOKENS = 2, 2, 8, 16
HIDDEN = HEADS * HEAD_SIZE
PROMPT = list(range(1000, 1000 + 4 * CHUNK_TOKENS))


class CPUConnector(GPUConnectorInterface):  # type: ignore[misc] # LMCache is not followed by mypy
    """The "GPU" is ``kv``: ``[2, layers, tokens, hidden]``."""

    def __init__(self, tokens: int) -> None:
        self.kv = torch.zeros(2, LAYERS, tokens, HIDDEN, dtype=torch.bfloat16)

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        self.kv[:, :, start:end] = memory_obj.tensor

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        memory_obj.tensor.copy_(self.kv[:, :, start:end])

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        for obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(obj, start, end)

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(obj, start, end)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, LAYERS, num_tokens, HIDDEN])


class Engine:
    """LMCache with the plugin, configured as its users do."""

    def __init__(self, name: str, options: dict[str, Any], **settings: Any) -> None:
        self.name = name
        self.connector = CPUConnector(len(PROMPT))
        self.config = plugin_config(options, **settings)
        self.lmcache: LMCacheEngine = LMCacheEngineBuilder.get_or_create(
            name, self.config, metadata(), self.connector, lambda tensor, rank: None, lambda item, rank: item
        )
        self.lmcache.post_init()

    @property
    def manager(self) -> Any:
        return self.lmcache.storage_manager

    @property
    def plugin(self) -> VCacheBackend:
        backend: VCacheBackend = self.manager.storage_backends["vcache"]
        return backend

    def store(self, tokens: list[int], seed: int = 1) -> torch.Tensor:
        """Fills the "GPU" with seeded KV and stores it; the KV."""
        self.connector.kv.copy_(
            torch.randn(self.connector.kv.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        )
        self.lmcache.store(tokens)
        return self.connector.kv.clone()

    def retrieve(self, tokens: list[int]) -> tuple[int, torch.Tensor]:
        """How many tokens were loaded, into a "GPU" that held zeros; its KV."""
        self.connector.kv.zero_()
        mask = self.lmcache.retrieve(tokens)
        loaded = int(mask.sum())
        assert mask[:loaded].all(), "what is loaded is a prefix"
        return loaded, self.connector.kv.clone()

    def objects_in_use(self) -> int:
        """Objects of LMCache's own pool that somebody holds."""
        stats = self.manager.local_cpu_backend.memory_allocator.pin_allocator
        return int(stats.num_active_allocations)

    def close(self) -> None:
        LMCacheEngineBuilder.destroy(self.name)


def plugin_config(options: dict[str, Any], **settings: Any) -> LMCacheEngineConfig:
    return LMCacheEngineConfig.from_dict(
        {
            "chunk_size": CHUNK_TOKENS,
            "local_cpu": False,
            "max_local_cpu_size": 0.01,
            "storage_plugins": "vcache",
            "pre_caching_hash_algorithm": "sha256_cbor",
            "extra_config": {
                "storage_plugin.vcache.module_path": "vcache_lmcache",
                "storage_plugin.vcache.class_name": "VCacheBackend",
                "vcache": {**PATIENT, **options},
            },
            **settings,
        }
    )


def metadata(dtype: torch.dtype = torch.bfloat16) -> LMCacheMetadata:
    return LMCacheMetadata(
        model_name="model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=dtype,
        kv_shape=(LAYERS, 2, CHUNK_TOKENS, HEADS, HEAD_SIZE),
        role="worker",
        chunk_size=CHUNK_TOKENS,
    )
