"""What names a request's chunks: vLLM's own block hashes where they mean the same everywhere, else the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vcache_vllm.prompt_keys import KeySource, Undescribed
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from tests.engine.kv import BLOCK, CHUNK, model_of
from vcache.keys import ChunkKey

pytestmark = pytest.mark.vllm

TOKENS = list(range(3 * CHUNK + 1))
MakeRequest = Callable[..., Request]


@pytest.fixture(params=["sha256", "sha256_cbor", "xxhash"])
def hash_name(request: pytest.FixtureRequest) -> str:
    """The first two are the same in every process; with the third, keys are made of the tokens."""
    name: str = request.param
    return name


@pytest.fixture
def make(hash_name: str) -> MakeRequest:
    hash_function = get_hash_fn_by_name(hash_name)
    init_none_hash(hash_function)

    def make(tokens: list[int] | None = TOKENS, **options: Any) -> Request:
        hasher = get_request_block_hasher(BLOCK, hash_function)
        return Request("name", tokens, SamplingParams(max_tokens=8), None, block_hasher=hasher, **options)

    return make


def keys(request: Request, hash_name: str, tokens: int = len(TOKENS), **model: Any) -> list[ChunkKey]:
    prompt = KeySource(model_of(**model), hash_name=hash_name).of(request)
    prompt.extend(tokens)
    return list(prompt.keys)


def test_a_key_names_a_chunk_and_everything_before_it(make: MakeRequest, hash_name: str) -> None:
    whole = keys(make(), hash_name)
    assert len(set(whole)) == 3
    assert keys(make(), hash_name) == whole
    other = [*TOKENS]
    other[CHUNK] += 1
    branch = keys(make(other), hash_name)
    assert branch[0] == whole[0]
    assert not {*branch[1:]} & {*whole}
    assert keys(make(), hash_name, CHUNK + 1) == whole[:1]


def test_a_prompt_that_grows_has_the_keys_of_the_whole(make: MakeRequest, hash_name: str) -> None:
    request = make()
    prompt = KeySource(model_of(), hash_name=hash_name).of(request)
    prompt.extend(request.num_tokens)
    request.append_output_token_ids(list(range(CHUNK)))
    prompt.extend(request.num_tokens)
    assert list(prompt.keys) == keys(make([*TOKENS, *range(CHUNK)]), hash_name, 4 * CHUNK)


def test_models_salts_and_adapters_share_nothing(make: MakeRequest, hash_name: str, tmp_path: Path) -> None:
    def adapter(name: str, weights: bytes) -> LoRARequest:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
        return LoRARequest("the same name", 1, str(tmp_path / name))

    found = [
        keys(make(), hash_name),
        keys(make(), hash_name, name="another model"),
        keys(make(cache_salt="a"), hash_name),
        keys(make(cache_salt="b"), hash_name),
        keys(make(lora_request=adapter("one", b"1")), hash_name),
        keys(make(lora_request=adapter("two", b"2")), hash_name),
    ]
    assert len({key for chunk_keys in found for key in chunk_keys}) == 3 * len(found)
    assert keys(make(lora_request=adapter("one", b"1")), hash_name) == found[4]
    assert keys(make(lora_request=adapter("one", b"new")), hash_name) != found[4]


def test_what_has_no_name_in_a_key_is_declined(make: MakeRequest, hash_name: str, tmp_path: Path) -> None:
    embeddings = make(None, prompt_embeds=torch.zeros(3 * CHUNK, 8))
    replaced = make(lora_request=LoRARequest("a", 1, str(tmp_path), load_inplace=True))
    nowhere = make(lora_request=LoRARequest("a", 1, "somebody/adapter"))
    for request in (embeddings, replaced, nowhere, make(resumable=True)):
        with pytest.raises(Undescribed):
            keys(request, hash_name)
