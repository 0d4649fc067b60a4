"""From vLLM's configuration to a ``ModelSpec``: everything that determines the bytes of a block, and what we decline.

Made by the worker, which alone knows the attention backend and the tensors' layout; the scheduler side gets it by handshake.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, Final

import torch
import vllm
from vllm.config.utils import normalize_value
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from vcache.errors import ConfigError
from vcache.keys import ModelSpec
from vcache_vllm.parallel import RankPlace
from vcache_vllm.weights import weights_digest

#: Parts of a model's configuration that say where it came from, not what it computes.
_NOT_COMPUTATION: Final = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype")
#: Formats whose weights lie where the loader's own settings say, not with the model.
_LOADED_FROM_ELSEWHERE: Final = ("tensorizer", "modelexpress")
#: Of vLLM's options of attention, those that change what it computes, or in what form it keeps K; the others are about speed.
_ATTENTION_OPTIONS: Final = (
    "disable_flashinfer_q_quantization",
    "indexer_kv_dtype",
    "use_non_causal",
    "use_prefill_query_quantization",
)
#: Of those of images, sounds and videos: what its hashes of them do not tell apart between engines.
_MULTIMODAL_OPTIONS: Final = (
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_processor_kwargs",
    "video_pruning_method",
    "video_pruning_rate",
)


def reason_to_decline(vllm_config: Any, kv_cache_config: Any) -> str:
    """Why this engine's KV cannot be shared rightly, in one line; empty when it can."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            return f"{name} = {getattr(parallel, name)} divides a block among ranks; only 1 is supported yet"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return (
            f"vLLM's hybrid KV cache manager keeps {len(groups)} groups of layers apart; with "
            "--disable-hybrid-kv-cache-manager there is one, if all layers are attention"
        )
    for spec in layer_specs(groups[0]):
        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
            return f"a layer's KV is of the kind {type(spec).__name__}; only full attention is supported yet"
        # So on CPUs without AMX: such a prefill looks at its own tokens only, and a loaded prefix would be passed over.
        if type(spec) is MLAAttentionSpec and not vllm_config.scheduler_config.enable_chunked_prefill:
            return "vLLM has chunked prefill off for latent attention (MLA): it cannot go on from a loaded prefix"
    return ""


def model_spec(
    vllm_config: Any,
    kv_cache_config: Any,
    place: RankPlace,
    *,
    chunk_size: int,
    layout: str,
    weights: str | None = None,
) -> ModelSpec:
    """The description of this engine's KV, the same from each of its ranks.

    layout: ``PagedKV.layout`` of its tensors. weights: what they are called; None for what ``_weights`` finds.

    Raises ``ConfigError`` when vLLM describes a model that cannot be, ``OSError`` when weights cannot be read.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    group = kv_cache_config.kv_cache_groups[0]
    spec = layer_specs(group)[0]
    return ModelSpec(
        model=f"named:{weights}" if weights is not None else _weights(model),
        revision=_revision(model),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_cache_dtype=str(cache.cache_dtype),
        num_layers=len(group.layer_names) if place.pipeline == 1 else model.get_total_num_hidden_layers(),
        num_kv_heads=spec.num_kv_heads * place.tensor,
        head_size=spec.head_size,
        block_size=cache.block_size,
        chunk_size=chunk_size,
        # The bytes of a block are the backend's business. A pipeline's ranks have different numbers of like layers.
        kv_layout=f"opaque {layout if place.pipeline == 1 else _kinds(layout)}",
        tensor_parallel_size=place.tensor,
        pipeline_parallel_size=place.pipeline,
        extra=(
            ("attention", _attention(vllm_config, group.layer_names)),
            ("attention_options", _chosen(vllm_config.attention_config, _ATTENTION_OPTIONS)),
            ("computation", _digest(_computation(model))),
            ("draft", _draft(vllm_config.speculative_config)),
            ("layers", _layers(vllm_config, group.layer_names)),
            ("load_format", _load_format(vllm_config)),
            ("multimodal_options", _chosen(model.multimodal_config, _MULTIMODAL_OPTIONS)),
            ("parallel", str(vllm_config.parallel_config.tensor_parallel_size)),  # it decides how sums are rounded
            ("platform", _platform()),
            ("unquantized_kv", ",".join(sorted(cache.kv_cache_dtype_skip_layers))),
            ("vllm", vllm.__version__),
        ),
    )


def layer_specs(group: Any) -> list[Any]:
    """What vLLM says of the KV of a group's layers."""
    spec = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def _kinds(layout: str) -> str:
    """The kinds of tensors in a ``PagedKV.layout``, without how many there are of each."""
    return " ".join(sorted({kind.partition("x")[2] for kind in layout.split()}))


def _layers(vllm_config: Any, layer_names: list[str]) -> str:
    """Which layers the shards hold. In a pipeline each rank sees only its own, but knows how they are divided."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size == 1:
        return _digest(sorted(layer_names))
    layers, ranks = vllm_config.model_config.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    return _digest([get_pp_indices(layers, rank, ranks) for rank in range(ranks)])


def _weights(model: Any) -> str:
    """An address in an object store, a digest of local files, or a repository's name (its revision stands beside it)."""
    return str(model.model_weights or weights_digest(Path(model.model)) or model.model)


def _revision(model: Any) -> str:
    return str(model.revision or getattr(model.hf_config, "_commit_hash", None) or "")


def _computation(model: Any) -> Any:
    """What vLLM makes of the weights: their configuration, overrides and all, quantisation as they are loaded, the code."""
    return [
        _without_origin(model.hf_config.to_dict()),
        model.quantization,
        normalize_value(model.quantization_config),
        model.architecture,
        model.model_class_overrides,
        model.code_revision,
        _longest_context(model),
    ]


def _longest_context(model: Any) -> int | None:
    """Of models whose positions are encoded in another way where long contexts are allowed (LongRoPE), the longest one."""
    kinds = str(getattr(model.hf_text_config, "rope_parameters", None))
    return model.max_model_len if "longrope" in kinds else None


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_origin(inner) for name, inner in value.items() if name not in _NOT_COMPUTATION}
    return [_without_origin(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _chosen(options: Any, names: tuple[str, ...]) -> str:
    """The values of these options; empty where there are none."""
    return "" if options is None else _digest([normalize_value(getattr(options, name, None)) for name in names])


def _attention(vllm_config: Any, layer_names: list[str]) -> str:
    """The backends that write the blocks; some pack them differently from others."""
    layers = vllm_config.compilation_config.static_forward_context
    kinds = set()
    for name in layer_names:
        layer = layers.get(name)
        if layer is None:
            raise ConfigError(f"model.layers: vLLM has no attention layer named {name!r}")
        kinds.add(f"{layer.get_attn_backend().get_name()}{_instruction_set(layer)}")
    return ",".join(sorted(kinds))


def _instruction_set(layer: Any) -> str:
    # The CPU backend packs K by the instruction set it found; its metadata builder leaves the name with the layer.
    return f"/{layer.isa}" if hasattr(layer, "isa") else ""


def _draft(speculative: Any) -> str:
    """The model that drafts tokens: where it has layers of its own, their KV is in the blocks too."""
    if speculative is None:
        return ""
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None:
        return f"{speculative.method}:"
    return f"{speculative.method}:{_digest([_weights(draft), _revision(draft), str(draft.dtype), _computation(draft)])}"


def _load_format(vllm_config: Any) -> str:
    """Random ("dummy") weights depend on the seed; most formats load the same weights in other ways."""
    load = vllm_config.load_config
    if load.load_format == "dummy":
        return f"dummy:{vllm_config.model_config.seed}"
    if load.load_format in _LOADED_FROM_ELSEWHERE:
        return f"{load.load_format}:{_digest(load.model_loader_extra_config)}"
    return ""


def _platform() -> str:
    if torch.cuda.is_available():
        return f"cuda:{'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return f"cpu:{platform.machine()}:{torch.backends.cpu.get_cpu_capability()}"
