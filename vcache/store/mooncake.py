"""A Mooncake store, reached through a process of its own (``mooncake_process.py``) that this file starts, asks and replaces.

Nothing here calls Mooncake, so nothing Mooncake does can hold this process's GIL or end it. Payloads are not copied on the
way: Mooncake reads and writes staging memory, which both processes have mapped.

Evidence. A block that a transfer may still touch stays held until the Mooncake process has said that the transfer is over;
one whose transfer *failed* until the process has ended, since a failed one-sided transfer cannot be called back. When such
blocks add up, the process is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.companion.companion import Companion
from vcache.companion.link import LinkClosedError
from vcache.errors import UnavailableError
from vcache.store.base import Arrived, Got, Put, Shard
from vcache.store.mooncake_command import address_towards, mooncake_environment, require_mooncake
from vcache.store.mooncake_objects import object_name
from vcache.store.mooncake_wire import DECODER, MAY_BE_THERE, Ask, Exist, Get, Object, PutAll, Remove, Setup

if TYPE_CHECKING:
    import torch

    from vcache.store.staging import Block, Staging
    from vcache.store_config import MooncakeConfig

logger = logging.getLogger(__name__)

#: An ask not answered for so long beyond its time has met a Mooncake process that hangs as a whole: it is replaced. Mooncake's own calls take
#: up to 4.3 s without a master, whatever their time-outs.
HANG_S: Final = 10.0
#: Of the guard's deadline: how long a batch waits for its slowest owner before it goes on without it.
PATIENCE: Final = 0.7
#: Of staging memory: what failed transfers may keep before the Mooncake process is replaced.
TAINTED_SHARE: Final = 8

MOONCAKE_COUNTERS: Final = {
    "store_process_starts": "Mooncake processes started",
    "store_process_joins": "of these, joined the store: only then do calls go through",
    "store_late_parts": "calls that went on without an owner of some of their objects, because it was late",
}


class MooncakeStore:
    """A ``Store`` whose buffers must be blocks of ``staging``, as the guard's are. Its calls raise while Mooncake is away."""

    def __init__(self, config: MooncakeConfig, staging: Staging, *, timeout_s: float, write_timeout_s: float) -> None:
        """Starts the Mooncake process and does not wait for it. The time-outs are the guard's.

        Raises ``ConfigError`` when Mooncake is not installed.
        """
        require_mooncake()
        self._staging = staging
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._prefix = config.key_prefix
        self._setup = Setup(
            master=config.master,
            metadata=config.metadata,
            protocol=config.protocol,
            devices=config.devices,
            hostname=config.hostname,
            segment_bytes=config.segment_size,
            replicas=config.replicas,
            soft_pin_s=config.soft_pin,
            key_prefix=config.key_prefix,
            staging_bytes=staging.nbytes,
        )
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(MOONCAKE_COUNTERS, 0)
        self._closed = False
        self._joined: Companion | None = None  # the last that joined the store
        self._process: Companion | None = self._started()

    def contains(self, shards: Sequence[Shard]) -> Sequence[bool]:
        codes = self._ask(Exist([object_name(self._prefix, shard) for shard in shards]))
        return [code == 1 for code in codes]

    def get_into(
        self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor], arrived: Arrived | None = None
    ) -> Sequence[Got]:
        blocks = self._blocks(buffers)
        timeout_s = self._timeout_s * PATIENCE
        codes = self._ask(Get(_objects(shards, blocks), timeout_s), blocks, timeout_s=timeout_s, arrived=arrived)
        return [Got(code) if code >= 0 else Got.FAILED for code in codes]

    def put_from(self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Put]:
        blocks = self._blocks(buffers)
        timeout_s = self._write_timeout_s * PATIENCE
        codes = self._ask(PutAll(_objects(shards, blocks), timeout_s), blocks, timeout_s=timeout_s)
        return [Put(code) if code >= 0 else Put.FAILED for code in codes]

    def remove(self, shards: Sequence[Shard]) -> int | None:
        codes = self._ask(Remove([object_name(self._prefix, shard) for shard in shards]))
        return None if MAY_BE_THERE in codes else sum(codes)

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            process = self._process
        if process is not None:
            with contextlib.suppress(LinkClosedError):  # the next call starts another
                self._has_joined(process)
        with self._lock:
            return dict(self._counts)

    def close(self, timeout_s: float = 10.0) -> None:
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.end(timeout_s)

    def _ask(
        self, ask: Ask, blocks: Sequence[Block] = (), *, timeout_s: float = 0.0, arrived: Arrived | None = None
    ) -> list[int]:
        """Raises ``UnavailableError`` when there is no answer."""
        process = self._current()
        answer = process.ask(ask, blocks, timeout_s + HANG_S, arrived)
        if answer is None:
            self._replace(process)
            raise UnavailableError("the Mooncake process ended or hung; it is started anew")
        if answer.error:
            raise UnavailableError(answer.error)
        if not answer.last:
            with self._lock:
                self._counts["store_late_parts"] += 1
        if process.tainted_bytes > self._staging.nbytes // TAINTED_SHARE:
            logger.warning("replacing the Mooncake process, to take back the memory of failed transfers")
            self._replace(process)
        return answer.codes

    def _current(self) -> Companion:
        """The Mooncake process, if it is ready for calls; started anew if it ended."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the Mooncake store is closed")
            if self._process is None:
                self._process = self._started()
            process = self._process
        try:
            if self._has_joined(process):
                return process
        except LinkClosedError as error:
            self._replace(process)
            raise UnavailableError(str(error)) from error
        raise UnavailableError(f"no Mooncake master at {self._setup.master} yet")

    def _has_joined(self, process: Companion) -> bool:
        """Whether it is ready for calls. Raises ``LinkClosedError`` when it ended."""
        if process.ready() is None:
            return False
        with self._lock:
            self._counts["store_process_joins"] += process is not self._joined
            self._joined = process
        return True

    def _started(self) -> Companion:
        """Under the lock, or before anybody else knows this store."""
        self._counts["store_process_starts"] += 1
        hostname = self._setup.hostname or address_towards(self._setup.master)
        setup = msgspec.structs.replace(self._setup, hostname=hostname)
        return Companion(
            "vcache.store.mooncake_process",
            setup,
            DECODER,
            fds=(self._staging.fd,),
            environment=_environment(hostname, self._setup.protocol, self._timeout_s),
        )

    def _replace(self, process: Companion) -> None:
        """Ends ``process``, so that the next call starts another."""
        with self._lock:
            if self._process is process:
                self._process = None
        process.kill()

    def _blocks(self, buffers: Sequence[torch.Tensor]) -> list[Block]:
        blocks = [block for buffer in buffers if (block := self._staging.block_of(buffer)) is not None]
        if len(blocks) != len(buffers):
            raise ValueError("buffers must be blocks of the staging memory this store was given")
        return blocks


def _environment(hostname: str, protocol: str, timeout_s: float) -> dict[str, str]:
    environment = mooncake_environment(hostname, timeout_s)
    if protocol == "tcp":
        environment.setdefault("MC_FORCE_TCP", "1")  # else the engine takes what devices it finds
    return environment


def _objects(shards: Sequence[Shard], blocks: Sequence[Block]) -> list[Object]:
    return [Object(*shard, block.offset, block.nbytes) for shard, block in zip(shards, blocks, strict=True)]
