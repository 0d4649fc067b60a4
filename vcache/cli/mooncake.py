"""``vcache mooncake``: a local Mooncake store for trying out, and memory for one that exists."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

app = typer.Typer(help="Run a Mooncake store to try out, or give memory to one.", no_args_is_help=True)

LOOPBACK = "127.0.0.1"
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory to give, such as 8GiB.")]


@app.command()
def start(
    port: Annotated[int, typer.Option(help="Port of the master, on the loopback interface.")] = 50051,
    metrics_port: Annotated[int, typer.Option(help="Port of its metrics, on the loopback interface.")] = 9003,
    memory: Memory = "1GiB",
) -> None:
    """Run a Mooncake master and one owner of memory on this host until told to end (SIGTERM or Ctrl-C)."""
    import signal
    import subprocess

    from vcache.store.mooncake_command import master_command, mooncake_environment
    from vcache.units import parse_size

    master = f"{LOOPBACK}:{port}"
    nbytes = parse_size(memory)
    owner = [sys.executable, "-m", "vcache.store.mooncake_owner", master, str(nbytes), LOOPBACK, "P2PHANDSHAKE", "tcp"]
    ending = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, ending
    )  # from here on they are waited for; the owner takes the mask off again
    environment = mooncake_environment(LOOPBACK)
    commands = (master_command(host=LOOPBACK, port=port, metrics_port=metrics_port), owner)
    first, second = (subprocess.Popen(command, env=environment, start_new_session=True) for command in commands)
    try:
        print(f"Mooncake at {master}: use it with VCACHE_STORE__MOONCAKE__MASTER={master}", flush=True)
        ended = signal.sigwait(ending) is signal.SIGCHLD
        second.terminate()
        second.wait(10)
    except subprocess.TimeoutExpired:
        ended = True
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
    from vcache.units import parse_size

    require_mooncake()
    host = hostname or address_towards(master)
    command = [
        sys.executable,
        "-m",
        "vcache.store.mooncake_owner",
        master,
        str(parse_size(memory)),
        host,
        metadata,
        protocol,
    ]
    command += [devices] if devices else []
    sys.stdout.flush()
    os.execve(command[0], command, mooncake_environment(host))
