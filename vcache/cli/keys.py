"""``vcache keys``: makes the CURVE key files that an endpoint beyond this host needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keys(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the key files go; made if it is not there.")],
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A client to make a key pair for; repeatable. Default: one named client."),
    ] = None,
) -> None:
    """Make CURVE key files: the server's, unless there, and one pair for each client. Secret ones have mode 0600."""
    from vcache.curve import create_key_files

    directory = directory.absolute()
    clients = directory / "clients"
    names = list(dict.fromkeys(client or ["client"]))
    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise typer.BadParameter(f"{name!r}: letters, digits, - and _ only", param_hint="--client")
    there = [name for name in names if (clients / f"{name}.key").exists() or (clients / f"{name}.key_secret").exists()]
    if there:
        typer.echo(
            f"vcache keys: {clients} has keys of {', '.join(there)} already; nothing was replaced. Name other clients by "
            "--client, or delete those files first",
            err=True,
        )
        raise typer.Exit(1)
    try:
        if not (directory / "server.key_secret").exists():
            create_key_files(directory, "server")
        for name in names:
            create_key_files(clients, name)
    except OSError as error:
        typer.echo(f"vcache keys: {error}; nothing was replaced", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"# where the server runs\nserver:\n  curve:\n    server_secret_key_file: {directory}/server.key_secret\n"
        f"    authorized_clients_dir: {clients}\n"
    )
    for name in names:
        typer.echo(
            f"# where {name} runs (copy the two files there)\nserver:\n  curve:\n"
            f"    server_public_key_file: {directory}/server.key\n"
            f"    client_secret_key_file: {clients}/{name}.key_secret\n"
        )
