"""CURVE key files: made safely, read strictly, demanded where needed, and good for a real handshake."""

from __future__ import annotations

import stat

import pytest
import zmq

from vcache.config import VCacheConfig
from vcache.curve import (
    authorized_clients,
    create_key_files,
    read_key_pair,
    read_public_key,
    secure_client,
    secure_server,
    server_key_pair,
)
from vcache.errors import ConfigError


@pytest.fixture
def keys(tmp_path):
    create_key_files(tmp_path, "server")
    create_key_files(tmp_path / "clients", "one")
    return tmp_path


def server_side(keys, **more) -> VCacheConfig:
    curve = {"server_secret_key_file": str(keys / "server.key_secret"), "authorized_clients_dir": str(keys / "clients")}
    return VCacheConfig(server={"curve": curve | more, "endpoint": "tcp://0.0.0.0:5555"})


def client_side(keys, **more) -> VCacheConfig:
    curve = {
        "server_public_key_file": str(keys / "server.key"),
        "client_secret_key_file": str(keys / "clients" / "one.key_secret"),
    }
    return VCacheConfig(server={"curve": curve | more, "endpoint": "tcp://10.0.0.1:5555"})


def test_secret_files_are_for_their_owner_only_and_hold_the_pair(keys):
    secret, public = keys / "server.key_secret", keys / "server.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    pair = read_key_pair(secret, "x")
    assert pair.public == read_public_key(public, "x") == zmq.curve_public(pair.secret)
    assert pair.secret.decode() not in public.read_text()


def test_no_key_file_is_ever_replaced(keys):
    before = (keys / "server.key_secret").read_text()
    with pytest.raises(FileExistsError, match=r"server\.key"):
        create_key_files(keys, "server")
    (keys / "server.key").unlink()
    with pytest.raises(FileExistsError, match="server.key_secret"):
        create_key_files(keys, "server")
    assert not (keys / "server.key").exists(), "a public key without its secret was left"
    assert (keys / "server.key_secret").read_text() == before


def test_a_secret_that_others_may_read_is_refused(keys):
    path = keys / "server.key_secret"
    path.chmod(0o640)
    with pytest.raises(
        ConfigError, match=r"server_secret_key_file = .* others may read it \(mode 0640\); run `chmod 600"
    ):
        server_key_pair(server_side(keys))


@pytest.mark.parametrize("text", ["", 'curve\n    public-key = "short"\n', "no keys", 'curve\n    secret-key = "x"\n'])
def test_a_file_that_holds_no_key_is_refused(keys, text):
    path = keys / "bad.key"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"client.setting = .*bad\.key.*vcache keys DIR"):
        read_public_key(path, "client.setting")


def test_a_missing_file_is_refused_by_the_name_of_its_setting(keys):
    config = client_side(keys, server_public_key_file=str(keys / "absent.key"))
    refused = pytest.raises(ConfigError, match=r"server\.curve\.server_public_key_file = .*absent")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket, refused:
        secure_client(socket, config)


def test_a_public_file_is_no_secret(keys):
    with pytest.raises(ConfigError, match="holds no secret key; give the .key_secret file"):
        read_key_pair(keys / "server.key", "s")


def test_within_the_host_no_keys_are_needed():
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        assert server_key_pair(VCacheConfig()) is None
        assert not secure_client(socket, VCacheConfig())


def test_a_server_beyond_the_host_needs_its_own_keys_not_just_a_client_s(keys):
    with pytest.raises(ConfigError, match=r"server_secret_key_file = ''.* needs its own secret key .*vcache keys DIR"):
        server_key_pair(client_side(keys))


def test_a_server_with_keys_needs_to_be_told_its_clients_on_any_endpoint(keys):
    config = VCacheConfig(server={"curve": {"server_secret_key_file": str(keys / "server.key_secret")}})
    with pytest.raises(ConfigError, match="authorized_clients_dir = ''"):
        server_key_pair(config)


def test_a_server_whose_list_of_clients_cannot_be_read_does_not_start(keys):
    with pytest.raises(ConfigError, match="authorized_clients_dir = .*nowhere': not a directory"):
        server_key_pair(server_side(keys, authorized_clients_dir=str(keys / "nowhere")))
    (keys / "clients" / "broken.key").write_text("no key")
    with pytest.raises(ConfigError, match=r"authorized_clients_dir = .*broken.key'"):
        server_key_pair(server_side(keys))


def test_a_client_of_a_server_beyond_the_host_needs_its_own_pair(keys):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        with pytest.raises(ConfigError, match="server_public_key_file = ''"):
            secure_client(socket, server_side(keys))
        with pytest.raises(ConfigError, match="client_secret_key_file = ''"):
            secure_client(socket, server_side(keys, server_public_key_file=str(keys / "server.key")))


def test_the_authorized_clients_are_those_in_the_directory_now(keys):
    config = server_side(keys)
    one = read_public_key(keys / "clients" / "one.key", "x")
    assert authorized_clients(config) == {one}
    create_key_files(keys / "clients", "two")
    assert len(authorized_clients(config)) == 2
    (keys / "clients" / "one.key").unlink()
    assert one not in authorized_clients(config)
    with pytest.raises(ConfigError, match="not a directory"):
        authorized_clients(server_side(keys, authorized_clients_dir=str(keys / "nowhere")))


def test_the_keys_on_both_sides_make_an_encrypted_connection(keys, runtime_dir):
    endpoint = f"ipc://{runtime_dir}/curve.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        for socket in (server, client):
            socket.linger = 0
        assert secure_server(server, server_side(keys))
        server.bind(endpoint)
        assert secure_client(client, client_side(keys))
        client.connect(endpoint)
        client.send(b"hello")
        assert server.poll(10_000), "no handshake"
        assert server.recv_multipart()[1] == b"hello"
