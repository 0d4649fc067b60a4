"""``vcache mooncake``: a local Mooncake store for trying out, and memory for one that exists."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vcache.cli.options import load_config
from vcache.ending import ending_signals
from vcache.units import approximate_size

if TYPE_CHECKING:
    from vcache.store_config import MooncakeConfig

app = typer.Typer(help="Run a Mooncake store to try out, or give memory to one.", no_args_is_help=True)

LOOPBACK = "127.0.0.1"
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory to give, such as 8GiB.")]
PORTS: Final[dict[str, Any]] = {"min": 1, "max": 65_535}
_PR_SET_PDEATHSIG: Final = 1
#: How long the owner may take to give its memory back; Mooncake's ``close`` has been seen to take 15 s.
_CLOSE_S: Final = 20.0


@app.command()
def start(
    port: Annotated[int, typer.Option(**PORTS, help="Port of the master, on the loopback interface.")] = 50051,
    metrics_port: Annotated[int, typer.Option(**PORTS, help="Port of its metrics, on the loopback interface.")] = 9003,
    memory: Memory = "1GiB",
) -> None:
    """Run a Mooncake master and one owner of memory here until told to end (SIGTERM, Ctrl-C, or its terminal is closed)."""
    import contextlib
    import ctypes
    import signal
    import subprocess

    from vcache.store.mooncake_command import master_command, mooncake_environment

    master = f"{LOOPBACK}:{port}"
    commands = (
        master_command(host=LOOPBACK, port=port, metrics_port=metrics_port),
        _owner(_checked(memory, master=master, metadata="P2PHANDSHAKE", protocol="tcp", devices=""), LOOPBACK),
    )
    ending = {*ending_signals(), signal.SIGCHLD}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, ending
    )  # from here on they are waited for; the owner takes the mask off again
    environment = mooncake_environment(LOOPBACK)
    libc = ctypes.CDLL(None)
    first, second = (
        subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - a bare system call
        )
        for command in commands
    )
    try:
        print(f"Mooncake at {master}: use it with VCACHE_STORE__MOONCAKE__MASTER={master}", flush=True)
        print(
            "vcache: the owner of the memory listens on two ports of all interfaces, since Mooncake takes no address to bind to, and "
            "asks nobody who they are: run this where nobody else can reach them",
            file=sys.stderr,
            flush=True,
        )
        while ended := signal.sigwait(ending) is signal.SIGCHLD:
            if first.poll() is not None or second.poll() is not None:  # else it was only stopped, or goes on
                break
        if not ended:
            second.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                second.wait(_CLOSE_S)
    finally:
        for child in (second, first):  # the master has nothing to lose
            child.kill()
            child.wait()
    if ended:
        print("vcache: mooncake_master or the owner of the memory ended by itself; see above", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def give(
    master: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The Mooncake master.")],
    memory: Memory,
    hostname: Annotated[
        str, typer.Option(help="This host's address for others (default: the one towards the master).")
    ] = "",
    metadata: Annotated[str, typer.Option(help="P2PHANDSHAKE, or the URL of a metadata server.")] = "P2PHANDSHAKE",
    protocol: Annotated[str, typer.Option(help="tcp or rdma.")] = "tcp",
    devices: Annotated[str, typer.Option(help="RDMA devices, separated by commas.")] = "",
) -> None:
    """Give memory of this host to a Mooncake store until told to end (SIGTERM or Ctrl-C)."""
    from vcache.store.mooncake_command import address_towards, mooncake_environment, require_mooncake

    require_mooncake()
    settings = _checked(memory, master=master, metadata=metadata, protocol=protocol, devices=devices)
    host = hostname or address_towards(master)
    command = _owner(settings, host)
    print(f"joining {master}; a line beginning with `ready` follows", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execve(command[0], command, mooncake_environment(host))


def _checked(memory: str, **arguments: str) -> MooncakeConfig:
    """The arguments as settings, which say why one cannot work. Raises ``ConfigError``."""
    from vcache.memory.host import available_memory

    arguments["segment_size"] = memory
    chosen: dict[str, Any] = {f"store__mooncake__{name}": value for name, value in arguments.items()}
    settings = load_config(None, store__kind="mooncake", **chosen).store.mooncake
    if not settings.segment_size:
        raise typer.BadParameter(f"{memory!r}: nothing to give; write a size such as 8GiB", param_hint="--memory")
    free = available_memory()
    if free is not None and settings.segment_size > free:  # Mooncake itself would try for ever
        raise typer.BadParameter(
            f"{memory!r}: this machine has {approximate_size(free)} to give; write a smaller size",
            param_hint="--memory",
        )
    return settings


def _owner(settings: MooncakeConfig, host: str) -> list[str]:
    """The command of a process that gives memory to the store, and does nothing else."""
    how = [settings.metadata, settings.protocol, *filter(None, [settings.devices])]
    module = "vcache.store.mooncake_owner"
    return [sys.executable, "-m", module, settings.master, str(settings.segment_size), host, *how]
