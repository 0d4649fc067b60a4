"""CURVE key files: making them, reading them, and putting them on sockets.

The files are ZPL certificates as ``zmq.auth`` reads them: NAME.key holds a public key, NAME.key_secret (mode 0600) both.
Whom a server lets in is the set of public keys in ``server.curve.authorized_clients_dir``; the server's ZAP handler asks
``authorized_clients`` for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import zmq
import zmq.auth

from vcache.config import VCacheConfig
from vcache.errors import ConfigError

_SECRET_MODE: Final = 0o600
_MAKE_KEYS: Final = "run `vcache keys DIR` to make key files"


class KeyPair(NamedTuple):
    """A CURVE key pair, Z85 text of 40 bytes each."""

    public: bytes
    secret: bytes


def create_key_files(directory: Path, name: str) -> tuple[Path, Path]:
    """Makes NAME.key (public) and NAME.key_secret (0600) in ``directory``; refuses to replace either.

    Raises ``FileExistsError`` naming the file that is in the way.
    """
    public, secret = zmq.curve_keypair()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret_path, public_path = directory / f"{name}.key_secret", directory / f"{name}.key"
    text = f'curve\n    public-key = "{public.decode()}"\n'
    _create(public_path, text, 0o644)
    try:
        _create(secret_path, text + f'    secret-key = "{secret.decode()}"\n', _SECRET_MODE)
    except FileExistsError:
        public_path.unlink()
        raise
    return public_path, secret_path


def _create(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
        file.write(text)


def read_public_key(path: Path, setting: str) -> bytes:
    """The public key in a key file; raises ``ConfigError`` naming ``setting``."""
    return _read(path, setting)[0]


def read_key_pair(path: Path, setting: str) -> KeyPair:
    """Both keys in a secret key file, which nobody else may read; raises ``ConfigError`` naming ``setting``."""
    public, secret = _read(path, setting)
    if secret is None:
        raise ConfigError(f"{setting} = {str(path)!r}: holds no secret key; give the .key_secret file ({_MAKE_KEYS})")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{setting} = {str(path)!r}: others may read it (mode {mode:04o}); run `chmod 600 {path}`")
    return KeyPair(public, secret)


def _read(path: Path, setting: str) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in filter(None, (public, secret)):
            if len(key) != 40:
                raise ValueError("a key has 40 characters")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting} = {str(path)!r}: not a readable CURVE key file ({error}); {_MAKE_KEYS}"
        ) from error
    return public, secret


def server_key_pair(config: VCacheConfig) -> KeyPair | None:
    """What a server binds with; ``None`` when it serves this host only and no keys are set.

    Raises ``ConfigError`` for an endpoint beyond this host without keys, or with keys but no readable list of clients.
    """
    curve = config.server.curve
    secret, clients = curve.server_secret_key_file, curve.authorized_clients_dir
    if secret and clients:
        authorized_clients(config)  # a server that lets nobody in should not start
        return read_key_pair(Path(secret), "server.curve.server_secret_key_file")
    if secret or clients or config.is_beyond_host:
        absent = "server.curve.authorized_clients_dir" if secret else "server.curve.server_secret_key_file"
        raise ConfigError(
            f"{absent} = '': a server bound to {config.endpoint} needs its own secret key and the directory of its "
            f"clients' public keys; {_MAKE_KEYS} and set both, or use a loopback address or an ipc endpoint"
        )
    return None


def authorized_clients(config: VCacheConfig) -> frozenset[bytes]:
    """The public keys of the clients a server lets in: every ``*.key`` file of the directory, read anew at each call."""
    setting = "server.curve.authorized_clients_dir"
    directory = Path(config.server.curve.authorized_clients_dir)
    if not directory.is_dir():
        raise ConfigError(
            f"{setting} = {str(directory)!r}: not a directory; give the one with clients' public .key files"
        )
    return frozenset(read_public_key(path, setting) for path in directory.glob("*.key"))


def key_problems(config: VCacheConfig) -> Iterator[str]:
    """What is wrong on this machine with the key files that are set, in words for a ``ConfigError``."""
    curve = config.server.curve
    checks: dict[str, Callable[[Path, str], object]] = {
        "server_public_key_file": read_public_key,
        "server_secret_key_file": read_key_pair,
        "client_secret_key_file": read_key_pair,
        "authorized_clients_dir": lambda path, setting: authorized_clients(config),
    }
    for name, check in checks.items():
        if path := getattr(curve, name):
            try:
                check(Path(path), f"server.curve.{name}")
            except ConfigError as error:
                yield str(error)


def secure_server(socket: zmq.Socket[bytes], config: VCacheConfig) -> bool:
    """Puts the server's keys on a socket before its bind; true when CURVE (and so a ZAP handler) is in force."""
    keys = server_key_pair(config)
    if keys is None:
        return False
    socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
    socket.curve_server = True
    return True


def secure_client(socket: zmq.Socket[bytes], config: VCacheConfig) -> bool:
    """Puts a client's keys on a socket before its connect; true when CURVE is in force."""
    curve = config.server.curve
    server, own = curve.server_public_key_file, curve.client_secret_key_file
    if not server and not own and not config.is_beyond_host:
        return False
    if not server or not own:
        absent = "server.curve.client_secret_key_file" if server else "server.curve.server_public_key_file"
        raise ConfigError(
            f"{absent} = '': a client of {config.endpoint} needs the server's public key and a key pair of its own; "
            f"{_MAKE_KEYS} and set both"
        )
    keys = read_key_pair(Path(own), "server.curve.client_secret_key_file")
    socket.curve_serverkey = read_public_key(Path(server), "server.curve.server_public_key_file")
    socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
    return True
