"""Tokens to chunk keys: the model's fingerprint, the tenant's salt, and the running digest over a prompt.

A key names a chunk *and everything before it*. It is the first 16 bytes of a SHA-256 over length-prefixed fields (domain
and version, fingerprint, salt, extra keys) followed by all tokens up to the chunk's end as little-endian uint32. The fields
come first and say their own lengths, so no two different inputs run together into one byte string. A prompt is hashed
once: the running digest is read at each chunk's end (``digest()`` finishes a copy of it).

The rank is *not* in the key: it stands beside it, so that one lookup asks for all ranks' shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Final, NewType, cast

from vcache.errors import ConfigError
from vcache.protocol import KEY_BYTES, MAX_KEYS_PER_CALL
from vcache.tokens import packed_tokens

if TYPE_CHECKING:
    from vcache.tokens import Tokens

ChunkKey = NewType("ChunkKey", bytes)

KEY_TEXT_PREFIX: Final = "vc1-"
_KEY_DOMAIN: Final = b"vcache/chunk-key/1"
_MODEL_DOMAIN: Final = b"vcache/model/1"
_TENANT_DOMAIN: Final = b"vcache/tenant/1"
_TOKEN_BYTES: Final = 4
_KEY_TEXT: Final = re.compile(r"vc1-([0-9a-f]{32})")


def _field(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that determines the bytes of a chunk besides its tokens, salt and extra keys.

    Two processes share KV exactly when their specs are equal. Sizes are of the whole model, before it is divided over ranks.

    model, revision: identity of the weights (a repository and commit, or a digest of local files).
    dtype, kv_cache_dtype: the computation's and the cache's; ``"auto"`` means ``dtype``.
    num_kv_heads, head_size: as the cache holds them; MLA has one head of ``kv_lora_rank + qk_rope_head_dim``.
    block_size, chunk_size: tokens; a chunk is a whole number of blocks.
    kv_layout: the order of axes inside a block (``"NHD"``, ``"HND"``, a backend's own name when it packs differently).
    extra: further (name, value) pairs that change the bytes: scales of a quantised cache, a rope override, an adapter
        merged into the weights.

    Raises ``ConfigError``, which names the field, on anything that cannot be.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    chunk_size: int = 256
    revision: str = ""
    kv_cache_dtype: str = "auto"
    kv_layout: str = "NHD"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "revision", "kv_cache_dtype", "kv_layout"):
            self._check_text(name, getattr(self, name), may_be_empty=name == "revision")
        for name, high in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ConfigError(f"model.{name}: {value!r} is not a whole number from 1 to {high}")
        if self.chunk_size % self.block_size:
            fit = max(self.block_size, self.chunk_size // self.block_size * self.block_size)
            raise ConfigError(
                f"model.chunk_size: {self.chunk_size} is not a multiple of block_size {self.block_size}; {fit} would work"
            )
        if self.ranks > 4096:
            raise ConfigError(f"model.tensor_parallel_size * pipeline_parallel_size: {self.ranks} is above 4096 ranks")
        extra: object = self.extra
        if not isinstance(extra, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in extra):
            raise ConfigError(f"model.extra: {self.extra!r} is not a tuple of (name, value) pairs")
        for pair in self.extra:
            for text in pair:
                self._check_text("extra", text, may_be_empty=text is pair[1])
        if len({name for name, _ in self.extra}) != len(self.extra):
            raise ConfigError(f"model.extra: a name stands twice in {self.extra!r}")

    @staticmethod
    def _check_text(name: str, value: object, *, may_be_empty: bool) -> None:
        if not isinstance(value, str) or not (value or may_be_empty):
            raise ConfigError(f"model.{name}: {value!r} is not a {'' if may_be_empty else 'non-empty '}string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"model.{name}: {value!r} has no UTF-8 form ({error.reason})") from None

    @property
    def ranks(self) -> int:
        """Shards that make up a chunk."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_size // self.block_size

    def fingerprint(self) -> bytes:
        """32 bytes over every field, by name, so that a field added later cannot be mistaken for another."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> bytes:
        digest = hashlib.sha256(_field(_MODEL_DOMAIN))
        for name in sorted(field.name for field in fields(self) if field.name != "extra"):
            digest.update(_field(name.encode()) + _field(str(getattr(self, name)).encode()))
        digest.update(_field(b"extra") + len(self.extra).to_bytes(8, "little"))
        for key, value in sorted(self.extra):
            digest.update(_field(key.encode()) + _field(value.encode()))
        return digest.digest()


_COUNTS: Final = {
    "num_layers": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_size": 1 << 20,
    "block_size": 1 << 20,
    "chunk_size": 1 << 24,
    "tensor_parallel_size": 4096,
    "pipeline_parallel_size": 4096,
}


class KeyChain:
    """The keys of one growing prompt: each token is hashed once, however the prompt arrives.

    Not thread-safe: it belongs to one request.
    """

    def __init__(
        self, *, chunk_size: int, fingerprint: bytes, salt: str = "", extra_keys: Sequence[str | bytes] = ()
    ) -> None:
        if type(chunk_size) is not int or chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
        self._chunk_bytes = chunk_size * _TOKEN_BYTES
        self._digest = hashlib.sha256(
            _field(_KEY_DOMAIN) + _field(fingerprint) + _field(_utf8("salt", salt)) + _extra_fields(extra_keys)
        )
        self._rest = b""

    def extend(self, tokens: Tokens) -> list[ChunkKey]:
        """Keys of the chunks that ``tokens`` (further ones of the prompt) complete. ``ValueError`` names ``tokens``."""
        data = packed_tokens(tokens)
        if self._rest:
            data = self._rest + data
        keys: list[bytes] = []
        view, step = memoryview(data), self._chunk_bytes
        update, digest = self._digest.update, self._digest.digest
        whole = len(data) // step * step
        for start in range(0, whole, step):
            update(view[start : start + step])
            keys.append(digest()[:KEY_BYTES])
        self._rest = bytes(view[whole:])
        return cast("list[ChunkKey]", keys)  # calling ChunkKey on each would cost a tenth of the hashing


def chunk_keys(
    tokens: Tokens, *, chunk_size: int, fingerprint: bytes, salt: str = "", extra_keys: Sequence[str | bytes] = ()
) -> list[ChunkKey]:
    """Keys of the full chunks of ``tokens``, a list of ints or a one-dimensional integer array or tensor.

    Tokens beyond the last full chunk have no key. ``extra_keys`` are what else this request's KV depends on (a LoRA's
    identity, hashes of images). Bad input raises a ``ValueError`` that names the argument.
    """
    return KeyChain(chunk_size=chunk_size, fingerprint=fingerprint, salt=salt, extra_keys=extra_keys).extend(tokens)


def parts_of(keys: Sequence[ChunkKey]) -> list[Sequence[ChunkKey]]:
    """``keys`` in as few calls as the protocol allows: one, save for the very longest prompts."""
    if len(keys) <= MAX_KEYS_PER_CALL:
        return [keys] if keys else []
    return [keys[start : start + MAX_KEYS_PER_CALL] for start in range(0, len(keys), MAX_KEYS_PER_CALL)]


def _extra_fields(extra_keys: Sequence[str | bytes]) -> bytes:
    if isinstance(extra_keys, (str, bytes)) or not isinstance(extra_keys, Iterable):
        raise ValueError(f"extra_keys must be a sequence of str or bytes, got {type(extra_keys).__name__}")
    encoded = []
    for item in extra_keys:
        if isinstance(item, str):
            encoded.append(_field(b"s" + _utf8("extra_keys", item)))
        elif isinstance(item, bytes):
            encoded.append(_field(b"b" + item))
        else:
            raise ValueError(f"extra_keys must hold str or bytes only, found {type(item).__name__}")
    return len(encoded).to_bytes(8, "little") + b"".join(encoded)


def tenant_of(salt: str) -> int:
    """The tenant's number as records carry it: 63 bits of a SHA-256 of the salt, 0 for no salt."""
    if not salt:
        return 0
    digest = hashlib.sha256(_field(_TENANT_DOMAIN) + _field(_utf8("salt", salt))).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def format_key(key: bytes) -> str:
    """The text form, ``vc1-`` and 32 hexadecimal digits, as logs show it."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key must be {KEY_BYTES} bytes, got {len(key)}")
    return KEY_TEXT_PREFIX + key.hex()


def parse_key(text: object) -> ChunkKey:
    """The key whose text form this is. ``ValueError`` says what is wrong with anything else."""
    found = _KEY_TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"key {text!r:.80} is not of the form {KEY_TEXT_PREFIX!r} and 32 lower-case hexadecimal digits"
        )
    return ChunkKey(bytes.fromhex(found[1]))


def _utf8(name: str, text: str) -> bytes:
    """``text`` as UTF-8, or a ``ValueError`` naming the argument."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has no UTF-8 form: {error.reason}") from None
