"""Which part of a chunk a worker holds: its rank among the shards, and whether it is the one that stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import MLAAttentionSpec


@dataclass(frozen=True)
class RankPlace:
    """A worker's place among the ranks that hold a model's KV.

    tensor, pipeline: how many ways the KV is divided. With MLA every tensor-parallel rank holds the same KV: it is stored
    once, by the first of them, and loaded by all.
    """

    rank: int
    tensor: int
    pipeline: int
    stores: bool = True


def rank_place(vllm_config: Any, specs: list[Any], *, tensor_rank: int, pipeline_rank: int) -> RankPlace:
    """The place of the worker with these ranks. ``specs``: of its layers' KV."""
    parallel = vllm_config.parallel_config
    pipeline: int = parallel.pipeline_parallel_size
    tensor: int = parallel.tensor_parallel_size
    if all(isinstance(spec, MLAAttentionSpec) for spec in specs):
        return RankPlace(pipeline_rank, 1, pipeline, stores=tensor_rank == 0)
    return RankPlace(pipeline_rank * tensor + tensor_rank, tensor, pipeline)


def this_place(vllm_config: Any, specs: list[Any]) -> RankPlace:
    """The place of this process, a worker of vLLM."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return rank_place(
        vllm_config, specs, tensor_rank=get_tp_group().rank_in_group, pipeline_rank=get_pp_group().rank_in_group
    )
