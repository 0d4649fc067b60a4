"""``vcache donate``: a stand-alone donor, whose segment outlives every serving process."""

from __future__ import annotations

import logging
import math
import re
import secrets
import signal
import threading
import time
from typing import Annotated, Final

import typer

from vcache.cli.options import ConfigFile, Settings, load_config
from vcache.ending import ending_signals

logger = logging.getLogger(__name__)

#: How long readers of the segment are waited for at the end.
CLOSE_TIMEOUT_S: Final = 10.0
MAX_LABEL: Final = 64
_DEVICE: Final = re.compile(r"(cpu|cuda):[0-9]+")


def donate(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Whose memory: cuda:0, cpu:0, ...")],
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="How much: 8GiB (default: segment.size).")] = None,
    tier: Annotated[
        str | None, typer.Option(metavar="TIER", help="vram, dram, or auto by the device (default: segment.tier).")
    ] = None,
    label: Annotated[str, typer.Option(metavar="TEXT", help="A name for `vcache status`.")] = "",
    config_file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Give a segment of a device's memory to the pool until told to end (SIGTERM, Ctrl-C, or its terminal is closed)."""
    from vcache import log
    from vcache.memory.allocation import allocate
    from vcache.pool.client import PoolClient
    from vcache.pool.donor import Donor, tier_of
    from vcache.pool.runtime_dir import RuntimeDir
    from vcache.protocol import Tier
    from vcache.units import approximate_size

    if not _DEVICE.fullmatch(device):
        raise typer.BadParameter(f"{device!r} is no device; use cuda:0, cuda:1, ... or cpu:0", param_hint="--device")
    if len(label) > MAX_LABEL or not label.isprintable():
        raise typer.BadParameter(f"at most {MAX_LABEL} printable characters, not {label!r}", param_hint="--label")
    told_to_end = threading.Event()
    for number in ending_signals():
        signal.signal(number, lambda *_: told_to_end.set())
    config = load_config(config_file, settings, segment__size=size, segment__tier=tier)
    log.configure(config.log_level, f"donor {device}")
    segment_id = secrets.token_bytes(16)
    memory = allocate(config, RuntimeDir(config.runtime_path), segment_id, config.segment.size, device=device)
    size_text = approximate_size(memory.nbytes)
    try:
        client = PoolClient(
            config,
            device=memory.device,
            # It demotes to segments of tier DRAM; and it may be ordered to copy into its own what other hosts evict.
            writes=tier_of(config.segment.tier, memory.device) is Tier.VRAM or config.transfer.remote != "none",
            name=f"donor {label or device}",
            maps_ahead=False,
        )
        donor = Donor(config, client, memory, segment_id, label=label)
    except BaseException:
        memory.close()
        raise
    try:
        patience_ends = time.monotonic() + config.client.connect_timeout
        while not told_to_end.is_set() and not donor.wait_registered(1.0):
            if time.monotonic() >= patience_ends:
                patience_ends = math.inf
                logger.warning(
                    "no metadata server at %s yet; the segment joins the pool once there is one", config.endpoint
                )
        if donor.registered:
            typer.echo(f"donating {size_text} of {device} to {config.endpoint} as segment {segment_id.hex()}")
        while not told_to_end.wait(1.0):  # a signal that another thread takes does not interrupt a wait of this one
            pass
        if not donor.close(CLOSE_TIMEOUT_S):
            logger.warning(
                "the server did not confirm within %g s that nobody reads the segment; who does will see misses",
                CLOSE_TIMEOUT_S,
            )
    finally:
        donor.close(0.0)
        client.close()
    typer.echo(f"took {size_text} of {device} back")
