"""The segment that an engine gives to the pool for its own life.

A stand-alone donor (``vcache donate``) is sturdier: its segment survives every serving process.
"""

from __future__ import annotations

import logging
import mmap
import secrets
from typing import TYPE_CHECKING, Final

from vcache.errors import ConfigError
from vcache.memory.allocation import allocate
from vcache.pool.donor import Donor
from vcache.units import parse_size

if TYPE_CHECKING:
    import torch

    from vcache.config import VCacheConfig
    from vcache.keys import ModelSpec
    from vcache.pool.client import PoolClient

logger = logging.getLogger("vcache.engine")

#: ``donate`` for as much as ``segment.size`` says.
AUTO: Final = "auto"


def donation_bytes(config: VCacheConfig, donate: int | str) -> int:
    """The size that ``donate`` asks for, in whole pages. Raises ``ConfigError`` when it is none."""
    try:
        nbytes = config.segment.size if donate == AUTO else parse_size(donate)
    except ValueError as error:
        raise ConfigError(f"donate = {donate!r}: {error}; or use 'auto' for segment.size") from None
    if nbytes < mmap.PAGESIZE:
        raise ConfigError(f"donate = {donate!r}: {nbytes} bytes are less than a page; use a size such as 8GiB, or None")
    return nbytes // mmap.PAGESIZE * mmap.PAGESIZE


def open_donation(
    config: VCacheConfig, client: PoolClient, model: ModelSpec, *, device: torch.device, nbytes: int, payload_bytes: int
) -> Donor:
    """Allocates the segment and gives it to the pool; the caller closes it, before its client.

    ``payload_bytes``: a shard's bytes (0: not known yet), so that a segment into which not one fits is refused.

    Raises ``CapacityError`` when there is not as much memory, ``ConfigError`` when no chunk fits; then nothing is left.
    """
    segment_id = secrets.token_bytes(16)
    memory = allocate(config, client.runtime, segment_id, nbytes, device=str(device))
    try:
        donor = Donor(config, client, memory, segment_id, label=f"engine {model.model}"[:256])
    except BaseException:
        memory.close()
        raise
    held = nbytes - donor.segment.data_offset
    if payload_bytes > held:
        donor.close(0.0)
        raise ConfigError(
            f"donate = {nbytes}: smaller than one chunk: {model.chunk_size} tokens of this model take {payload_bytes} "
            f"bytes, the segment holds {held}; donate more or use a smaller chunk_size"
        )
    return donor
