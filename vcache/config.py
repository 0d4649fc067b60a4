"""VCacheConfig: every setting of VCache, merged from defaults, a YAML file, the environment and arguments, and checked.

``system_config.yaml`` documents each setting with its default (a test keeps the two equal). A configuration that cannot
work fails here, at construction, with a ``ConfigError`` that names the field, the value, where it came from and what
would work. Not here: how text becomes bytes and seconds (``units.py``), how values are read and remembered
(``settings_sources.py``), the CURVE key files that ``server.curve`` names (``curve.py``), whether a segment holds one
chunk, which needs the model (``donation.py``).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vcache.errors import ConfigError
from vcache.protocol import MAX_MESSAGE_BYTES
from vcache.setting_types import Count, Fraction, Seconds, Section, Size, Unit
from vcache.settings_sources import (
    ENV_CONFIG_FILE,
    ENV_DELIMITER,
    ENV_PREFIX,
    ArgumentSource,
    EnvironmentSource,
    FileSource,
    environment_name,
    setting_fields,
)
from vcache.store_config import StoreConfig
from vcache.transfer_config import TransferConfig
from vcache.units import format_duration, format_size

#: ``sun_path`` holds 108 bytes, the closing zero among them.
MAX_IPC_PATH_BYTES: Final = 107
#: Liveness is judged on several heartbeats, so that one lost or late one means nothing.
MIN_HEARTBEATS_PER_LIVENESS: Final = 3
#: Segments are whole pages.
PAGE_BYTES: Final = 4096
#: One entry of a segment's directory (docs/segment-format.md).
RECORD_BYTES: Final = 128
DEFAULT_ORIGIN: Final = "default"
#: pydantic's errors about limits, and what they call the limit.
_LIMITS: Final = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
#: What pydantic says of a value of another type, told as what to write instead.
_TYPES: Final = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number such as {}",
    "int_from_float": "must be a whole number such as {}",
    "int_type": "must be a whole number such as {}",
    "float_parsing": "must be a number such as {}",
    "float_type": "must be a number such as {}",
    "string_type": "must be text; put it in quotes",
}
_DOTTED_NAME: Final = re.compile(r"[a-z_]+(?:\.[a-z_]+)*")


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class EvictionConfig(Section):
    """How the server makes room ahead of writes."""

    policy: Literal["lru"] = "lru"
    high_watermark: Fraction = 0.95
    low_watermark: Fraction = 0.90
    demotion_timeout: Seconds = 10.0
    pull: bool = True


class CurveConfig(Section):
    """CURVE key files (made by ``vcache keys``); needed when the endpoint is reachable beyond this host."""

    server_public_key_file: str = ""
    server_secret_key_file: str = ""
    client_secret_key_file: str = ""
    authorized_clients_dir: str = ""


class ServerConfig(Section):
    """The metadata server. Clients read ``endpoint`` and ``curve`` here too."""

    endpoint: str = ""
    heartbeat_interval: Seconds = 1.0
    liveness_timeout: Seconds = 10.0
    reservation_timeout: Seconds = 30.0
    incomplete_timeout: Seconds = 60.0
    max_lease: Seconds = 60.0
    placement: Literal["local_first", "most_free"] = "local_first"
    max_message_bytes: Annotated[Size, Field(ge=512 << 10, le=MAX_MESSAGE_BYTES)] = MAX_MESSAGE_BYTES
    shared_index: Annotated[Size, Field(ge=0)] = 1 << 30
    eviction: EvictionConfig = Field(default_factory=EvictionConfig)
    curve: CurveConfig = Field(default_factory=CurveConfig)


class ClientConfig(Section):
    """How long clients wait and hold."""

    connect_timeout: Seconds = 5.0
    call_timeout: Seconds = 1.0
    lease: Seconds = 10.0


class SegmentConfig(Section):
    """Segments that this process donates."""

    size: Annotated[Size, Field(ge=1 << 20)] = 1 << 30
    records: Annotated[Count, Field(ge=0, le=1 << 20)] = 0
    tier: Literal["auto", "vram", "dram"] = "auto"
    cuda_handles: Literal["auto", "vmm", "ipc"] = "auto"


class PromotionConfig(Section):
    """What is copied up after it was read from the store, from host memory or from another host."""

    policy: Literal["never", "first_hit", "nth_hit"] = "first_hit"
    hits: Annotated[Count, Field(ge=1, le=1000)] = 2
    queue_items: Annotated[Count, Field(ge=1, le=1 << 20)] = 4096


class VCacheConfig(BaseSettings):
    """All settings: defaults < YAML file < ``VCACHE_*`` environment < arguments.

    ``VCacheConfig(chunk_size=512, server={"endpoint": "..."})`` reads the file that ``VCACHE_CONFIG_FILE`` names, if
    any; ``VCacheConfig.load(path, ...)`` reads ``path`` instead. Frozen once made.

    Raises ``ConfigError`` when a setting is unknown, badly formed or contradicts another.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, case_sensitive=True
    )

    runtime_dir: str = ""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"
    chunk_size: Annotated[Count, Field(ge=1, le=1 << 20)] = 256
    block_size: Annotated[Count, Field(ge=1, le=1 << 20)] = 16
    server: ServerConfig = Field(default_factory=ServerConfig)
    client: ClientConfig = Field(default_factory=ClientConfig)
    segment: SegmentConfig = Field(default_factory=SegmentConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, config_file: str | Path | None = None, /, **arguments: Any) -> None:
        path = config_file or os.environ.get(ENV_CONFIG_FILE)
        sources = (
            ArgumentSource(type(self), arguments),
            EnvironmentSource(type(self)),
            FileSource(type(self), Path(path).expanduser() if path else None),
        )
        values = {name: value for source in reversed(sources) for name, value in source.values.items()}
        origins = {name: origin for source in reversed(sources) for name, origin in source.origins.items()}
        problems = [problem for source in sources for problem in source.problems]
        try:
            super().__init__(_build_sources=(sources, {}))
        except ValidationError as error:
            problems += _explained(error, values, origins)
        if problems:
            raise ConfigError("\n".join(problems))
        self._origins = origins

    def __eq__(self, other: object) -> bool:
        """Equal settings, wherever they came from."""
        return isinstance(other, VCacheConfig) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> Self:
        """The configuration of a YAML file (default: what ``VCACHE_CONFIG_FILE`` names), environment and overrides."""
        return cls(path, **overrides)

    @property
    def runtime_path(self) -> Path:
        """The directory that holds everything of this host; made on demand by those who write into it."""
        return Path(self.runtime_dir or f"/dev/shm/vcache-{os.getuid()}")

    @property
    def endpoint(self) -> str:
        """Where the metadata server is: ``server.endpoint``, or a socket in the runtime directory."""
        return self.server.endpoint or f"ipc://{self.runtime_path}/server.sock"

    @property
    def is_beyond_host(self) -> bool:
        """Whether the endpoint can be reached from other hosts, and so needs CURVE."""
        return not self.endpoint.startswith("ipc://") and not _is_loopback(_tcp_host_and_port(self.endpoint)[0])

    def origin(self, name: str) -> str:
        """Where the value of a setting ("server.endpoint") came from: default, FILE:LINE, a variable, or argument."""
        return self._origins.get(name, DEFAULT_ORIGIN)

    def settings(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting as (dotted name, value as a person would write it, origin)."""
        for name, field in setting_fields(type(self)):
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            unit = next((mark for mark in field.metadata if isinstance(mark, Unit)), None)
            yield name, unit.text(value) if unit else value, self.origin(name)

    def environment(self) -> dict[str, str]:
        """Environment variables under which a child process has exactly this configuration.

        Add them to an environment from which every other ``VCACHE_*`` variable was taken away.
        """
        return {
            environment_name(name): str(value)
            for name, value, origin in self.settings()
            if origin != DEFAULT_ORIGIN and value != ""
        }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [
            *self._contradictions(),
            *self._endpoint_problems(),
            *self.store.problems(),
            *self.transfer.problems(),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.chunk_size % self.block_size:
            below = self.chunk_size // self.block_size * self.block_size
            fits = f"{below} or {below + self.block_size}" if below else str(self.block_size)
            yield (
                f"chunk_size = {self.chunk_size}: must be a multiple of block_size = {self.block_size}; use {fits}, "
                "or another block_size"
            )
        eviction = self.server.eviction
        if eviction.low_watermark >= eviction.high_watermark:
            yield (
                f"server.eviction.low_watermark = {eviction.low_watermark}, down to which eviction frees, must be below "
                f"server.eviction.high_watermark = {eviction.high_watermark}, at which it begins"
            )
        least = MIN_HEARTBEATS_PER_LIVENESS * self.server.heartbeat_interval
        if self.server.liveness_timeout < least:
            yield (
                f"server.liveness_timeout = {format_duration(self.server.liveness_timeout)}: must be at least "
                f"{MIN_HEARTBEATS_PER_LIVENESS} times server.heartbeat_interval = "
                f"{format_duration(self.server.heartbeat_interval)}; use {format_duration(least)} or more"
            )
        if self.client.lease > self.server.max_lease:
            yield (
                f"client.lease = {format_duration(self.client.lease)}: longer than server.max_lease = "
                f"{format_duration(self.server.max_lease)}; shorten the one or raise the other"
            )
        if self.segment.size % PAGE_BYTES:
            whole = self.segment.size // PAGE_BYTES * PAGE_BYTES
            yield f"segment.size = {self.segment.size}: must be a multiple of {PAGE_BYTES} bytes (a page); use {whole}"
        # Header, directory and one page of data. What a chunk takes beyond that only the model says.
        least_bytes = 2 * PAGE_BYTES + self.segment.records * RECORD_BYTES
        if self.segment.size < least_bytes:
            yield (
                f"segment.records = {self.segment.records}: their directory leaves no room for data in segment.size = "
                f"{format_size(self.segment.size)}; leave segment.records out, or make the segment larger"
            )
        if self.runtime_dir and not Path(self.runtime_dir).is_absolute():
            yield f"runtime_dir = {self.runtime_dir!r}: must be an absolute path, such as /dev/shm/vcache"

    def _endpoint_problems(self) -> Iterator[str]:
        setting = "server.endpoint" if self.server.endpoint else "runtime_dir"
        shown = f"{setting} = {self.server.endpoint or self.runtime_dir!r}"
        if self.endpoint.startswith("ipc://"):
            path = self.endpoint.removeprefix("ipc://")
            if not path.startswith("/"):  # "@name" has no file and so no permissions; "*" would be known to nobody
                yield f"{shown}: an ipc endpoint needs an absolute path, such as ipc:///dev/shm/vcache/server.sock"
            elif len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
                yield (
                    f"{shown}: the socket's path {path} has {len(os.fsencode(path))} bytes, the system allows "
                    f"{MAX_IPC_PATH_BYTES}; use a shorter runtime_dir or server.endpoint"
                )
            return
        try:
            _tcp_host_and_port(self.endpoint)
        except ValueError as error:
            yield f"{shown}: {error}; use ipc:///PATH/server.sock or tcp://HOST:PORT"
            return
        curve = self.server.curve
        serves = bool(curve.server_secret_key_file and curve.authorized_clients_dir)
        calls = bool(curve.server_public_key_file and curve.client_secret_key_file)
        if self.is_beyond_host and not serves and not calls:
            yield (
                f"{shown}: reachable beyond this host, which needs CURVE keys; run `vcache keys DIR`, then set "
                "server.curve.server_secret_key_file and server.curve.authorized_clients_dir where the server runs, "
                "server.curve.server_public_key_file and server.curve.client_secret_key_file where clients run; "
                "or use a loopback address or an ipc endpoint"
            )


def _tcp_host_and_port(endpoint: str) -> tuple[str, int]:
    """Host and port of a tcp endpoint; raises ``ValueError`` saying what is wrong with it."""
    if not endpoint.startswith("tcp://"):
        raise ValueError("not an ipc:// or tcp:// endpoint")
    host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not colon or not host or ";" in endpoint or "/" in host:
        raise ValueError("not a host and a port")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
        raise ValueError(f"{port!r} is not a port between 1 and 65535")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError("an IPv6 address stands in brackets, as in tcp://[::1]:5555")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, an interface or "*": may be reached from anywhere


def _explained(error: ValidationError, values: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        message = str(cause) if cause is not None else detail["msg"]
        name = ".".join(str(part) for part in detail["loc"])
        if not name:  # contradictions: each line names the settings itself
            yield from (line + _origins_of(line, origins) for line in message.splitlines())
            continue
        value = values.get(name, detail["input"])
        if value is None:
            message = "has no value; write one, or leave the line out"
        elif detail["type"] in _LIMITS:
            message = _with_unit(name, message, detail["ctx"][_LIMITS[detail["type"]]])
        elif detail["type"] in _TYPES:
            default = dict(setting_fields(VCacheConfig))[name].default
            message = _TYPES[detail["type"]].format(default or 4)
        yield f"{name} = {value!r} (from {origins.get(name, DEFAULT_ORIGIN)}): {message}"


def _origins_of(line: str, origins: dict[str, str]) -> str:
    """Where the settings that a line names were set; nothing about defaults."""
    names = dict.fromkeys(_DOTTED_NAME.findall(line))
    told = ", ".join(f"{name} from {origins[name]}" for name in names if name in origins)
    return f" ({told})" if told else ""


def _with_unit(name: str, message: str, limit: float) -> str:
    """What pydantic says of a limit, with the limit as a person would write it."""
    field = dict(setting_fields(VCacheConfig))[name]
    unit = next((mark for mark in field.metadata if isinstance(mark, Unit)), None)
    return message.replace(f"{limit:.0f}", unit.text(limit)) if unit else message
