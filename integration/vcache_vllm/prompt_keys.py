"""The keys of a request's chunks: from the hashes that vLLM has made of its blocks, or from its tokens.

vLLM hashes every block of a prompt for its own prefix cache, each hash over all tokens before it, the request's cache salt, the
name and path of its LoRA adapter and the hashes of its images. Where these hashes are the same in every process, a chunk's key is
the hash of its last block, mixed with what they leave out (the model's fingerprint, the adapter's weights), and nothing is hashed
twice. Where they are not, keys are made of the tokens. The two never meet: engines that differ in this share nothing.
"""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from vllm.v1.core import kv_cache_utils

from vcache.joined_keys import JoinedKeys
from vcache.keys import KeyChain
from vcache.protocol import KEY_BYTES
from vcache_vllm.weights import weights_digest

if TYPE_CHECKING:
    from vcache.keys import ModelSpec

logger: Final = logging.getLogger(__name__)

_MASK_DOMAIN: Final = b"vcache/vllm-block-hash/1"
#: vLLM's names of hashes that do not collide, and that start from the same value in every process unless told otherwise.
_STABLE_HASHES: Final = ("sha256", "sha256_cbor")
#: Pairs of adapter and salt, whose part in the keys is computed once.
MASKS_KEPT: Final = 1024


class Undescribed(Exception):  # noqa: N818 - not an error: such a request is served without the pool
    """A request's KV depends on something that has no name in a key; the text says on what."""


class PromptKeys:
    """The keys of one request's chunks, in order; more of them as its tokens become known. See ``KeySource.of``."""

    def __init__(
        self, request: Any, chunk_size: int, blocks_per_chunk: int, mask: bytes, chain: KeyChain | None
    ) -> None:
        self._request = request
        self._chunk_size = chunk_size
        self._per_chunk = blocks_per_chunk
        self._mask = np.frombuffer(mask, dtype=np.uint8)
        self._chain = chain
        self.keys = JoinedKeys()

    def extend(self, tokens: int) -> None:
        """Adds the keys of the whole chunks among the request's first ``tokens`` tokens, as far as they are known yet."""
        done, wanted = len(self.keys), tokens // self._chunk_size
        if wanted <= done:
            return
        if self._chain is not None:
            first, end = done * self._chunk_size, min(wanted, self._request.num_tokens // self._chunk_size)
            more = b"".join(self._chain.extend(self._request.all_token_ids[first : end * self._chunk_size]))
            self.keys = JoinedKeys(self.keys.joined + more)
            return
        hashes = self._request.block_hashes
        wanted = min(wanted, len(hashes) // self._per_chunk)
        if wanted <= done:
            return
        last_blocks = hashes[(done + 1) * self._per_chunk - 1 : wanted * self._per_chunk : self._per_chunk]
        joined = np.frombuffer(b"".join(last_blocks), dtype=np.uint8).reshape(wanted - done, -1)
        self.keys = JoinedKeys(self.keys.joined + (joined[:, :KEY_BYTES] ^ self._mask).tobytes())


class KeySource:
    """How this engine names chunks."""

    def __init__(self, model: ModelSpec, *, hash_name: str) -> None:
        self._model = model
        self._fingerprint = model.fingerprint()
        self._adapters: dict[tuple[str, int], str] = {}
        self._mask = lru_cache(MASKS_KEPT)(self._mask_of)
        self.from_hashes = hash_name in _STABLE_HASHES
        if not self.from_hashes:
            logger.warning(
                "prefix_caching_hash_algo is %r, whose hashes differ between processes: VCache hashes each prompt again; "
                "use 'sha256' to spare that",
                hash_name,
            )

    def of(self, request: Any) -> PromptKeys:
        """The keys of a request, none yet. Raises ``Undescribed`` for one whose KV depends on something they cannot name."""
        if request.prompt_embeds is not None:
            raise Undescribed("a prompt given as embeddings")
        if request.resumable:
            raise Undescribed("a prompt that arrives as a stream")
        adapter = self._adapter(request.lora_request) if request.lora_request is not None else ""
        size, salt = self._model.chunk_size, request.cache_salt or ""
        if self.from_hashes and self._fits(request):
            return PromptKeys(request, size, self._model.blocks_per_chunk, self._mask(adapter, salt), None)
        extra = [adapter] if adapter else []
        for feature in request.mm_features or ():
            place = feature.mm_position
            extra += [str(feature.identifier), f"{place.offset}+{place.length}"]
        chain = KeyChain(chunk_size=size, fingerprint=self._fingerprint, salt=salt, extra_keys=extra)
        return PromptKeys(request, size, self._model.blocks_per_chunk, bytes(KEY_BYTES), chain)

    def _fits(self, request: Any) -> bool:
        """Whether there is one hash for each of our blocks; vLLM may hash in finer steps, or not at all."""
        if len(request.block_hashes) == request.num_tokens // self._model.block_size:
            return True
        self.from_hashes = False
        logger.warning("vLLM's block hashes are not one per block of %d tokens: unused", self._model.block_size)
        return False

    def _mask_of(self, adapter: str, salt: str) -> bytes:
        digest = hashlib.sha256(_MASK_DOMAIN)
        # NONE_HASH follows from PYTHONHASHSEED; engines that have set it differently share nothing.
        for field in (
            self._fingerprint,
            bytes(kv_cache_utils.NONE_HASH),
            adapter.encode(),
            salt.encode("utf-8", "replace"),
        ):
            digest.update(len(field).to_bytes(8, "little") + field)
        return digest.digest()[:KEY_BYTES]

    def _adapter(self, lora: Any) -> str:
        """What tells an adapter's weights apart: vLLM itself goes by its name and path."""
        if lora.load_inplace:
            raise Undescribed("a LoRA adapter that is replaced in place")
        known = (lora.lora_path, lora.lora_int_id)
        if known not in self._adapters:
            path = Path(lora.lora_path)
            weights = weights_digest(path)
            if not weights:
                raise Undescribed("a LoRA adapter that is not in a local directory")
            settings = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(path.glob("*.json"))))
            self._adapters[known] = f"lora:{weights}:{settings.hexdigest()}"
        return self._adapters[known]
