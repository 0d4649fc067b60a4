"""VCacheConfig: what each source may say, which one wins, and what is refused with which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tests.support.processes import REPOSITORY, child_environment
from vcache.config import VCacheConfig
from vcache.errors import ConfigError, VCacheError
from vcache.settings_sources import environment_name, setting_fields

DOCUMENTED = REPOSITORY / "system_config.yaml"
NAMES = [name for name, _ in setting_fields(VCacheConfig)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "vcache.yaml"
    path.write_text(text)
    return path


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        VCacheConfig(*arguments, **settings)
    return str(caught.value)


# --- the documented file -----------------------------------------------------------------------------------------------


def test_system_config_yaml_holds_every_setting_with_its_default():
    documented = VCacheConfig.load(DOCUMENTED)
    assert documented == VCacheConfig()
    for name in NAMES:
        assert documented.origin(name).startswith(f"{DOCUMENTED}:"), f"{name} is missing in system_config.yaml"


def test_every_setting_in_system_config_yaml_has_a_comment():
    lines = DOCUMENTED.read_text().splitlines()
    for name in NAMES:
        number = int(VCacheConfig.load(DOCUMENTED).origin(name).rpartition(":")[2])
        assert lines[number - 2].lstrip().startswith("#"), f"{name} (line {number}) has no comment above it"


def test_the_configuration_page_mentions_every_setting():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    for name in NAMES:
        assert f"`{name}`" in page, f"docs/configuration.md does not mention {name}"


# --- precedence and origin ---------------------------------------------------------------------------------------------


def test_arguments_win_over_environment_over_file_over_default(tmp_path, monkeypatch):
    path = written(tmp_path, "chunk_size: 512\nblock_size: 32\nclient:\n  lease: 5s\n  call_timeout: 2s\n")
    monkeypatch.setenv("VCACHE_CHUNK_SIZE", "1024")
    monkeypatch.setenv("VCACHE_CLIENT__LEASE", "6s")
    config = VCacheConfig.load(path, chunk_size=2048)
    assert (config.chunk_size, config.client.lease, config.client.call_timeout, config.block_size) == (2048, 6, 2, 32)
    assert config.client.connect_timeout == 5
    assert config.origin("chunk_size") == "argument"
    assert config.origin("client.lease") == "VCACHE_CLIENT__LEASE"
    assert config.origin("client.call_timeout") == f"{path}:5"
    assert config.origin("client.connect_timeout") == "default"


def test_a_section_given_as_an_argument_keeps_what_other_sources_said_of_it(tmp_path):
    path = written(tmp_path, "server:\n  eviction:\n    low_watermark: 0.5\n")
    config = VCacheConfig.load(path, server={"eviction": {"high_watermark": 0.8}})
    assert (config.server.eviction.low_watermark, config.server.eviction.high_watermark) == (0.5, 0.8)


def test_the_file_comes_from_vcache_config_file_unless_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("VCACHE_CONFIG_FILE", str(written(tmp_path, "chunk_size: 512")))
    assert VCacheConfig().chunk_size == 512
    other = tmp_path / "other.yaml"
    other.write_text("chunk_size: 1024")
    assert VCacheConfig.load(other).chunk_size == 1024
    assert VCacheConfig(other).chunk_size == 1024


def test_human_sizes_and_durations_from_every_source(tmp_path, monkeypatch):
    monkeypatch.setenv("VCACHE_SERVER__HEARTBEAT_INTERVAL", "250ms")
    config = VCacheConfig.load(written(tmp_path, "segment:\n  size: 8GiB\n"), client={"lease": "1min"})
    assert (config.segment.size, config.server.heartbeat_interval, config.client.lease) == (8 << 30, 0.25, 60)
    assert VCacheConfig(store={"mooncake": {"soft_pin": "30min"}}).store.mooncake.soft_pin == 1800


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\n", "server:\n  eviction:\n"])
def test_an_empty_file_or_section_changes_nothing(tmp_path, text):
    assert VCacheConfig.load(written(tmp_path, text)) == VCacheConfig()


def test_an_empty_variable_and_a_none_argument_count_as_not_given(monkeypatch):
    monkeypatch.setenv("VCACHE_CHUNK_SIZE", "")
    assert VCacheConfig(runtime_dir=None, client={}) == VCacheConfig()


def test_a_child_process_gets_exactly_this_configuration_through_its_environment(tmp_path):
    path = written(
        tmp_path, "segment: {size: 3MiB}\nclient: {lease: 123ms}\nserver: {eviction: {low_watermark: 0.1}}\n"
    )
    config = VCacheConfig.load(path, runtime_dir="/run/vcache-test", block_size=32, log_level="debug")
    ask = "from vcache.config import VCacheConfig; print(VCacheConfig().model_dump_json())"
    child = subprocess.run(
        [sys.executable, "-c", ask], env=child_environment(config), cwd="/", capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == config.model_dump_json()


def test_every_setting_survives_being_written_to_the_environment(monkeypatch):
    config = VCacheConfig(**yaml.safe_load(DOCUMENTED.read_text()))  # all of them from arguments, not by default
    for name, value in config.environment().items():
        monkeypatch.setenv(name, value)
    assert VCacheConfig() == config
    assert VCacheConfig().origin("segment.size") == environment_name("segment.size")


def test_a_configuration_cannot_be_changed_once_made():
    config = VCacheConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.chunk_size = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.server.endpoint = "ipc:///x"


# --- unknown names -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_in_the_file_is_refused_with_its_line_and_a_suggestion(tmp_path):
    path = written(tmp_path, "chunk_size: 512\nserver:\n  hartbeat_interval: 1s\n")
    assert refusal(path) == (
        f"server.hartbeat_interval (from {path}:3): there is no such setting; did you mean server.heartbeat_interval?"
    )


def test_an_unknown_argument_is_refused_with_a_suggestion_from_another_section():
    assert "heartbeat_interval (from argument): there is no such setting; did you mean server.heartbeat_" in refusal(
        heartbeat_interval="1s"
    )


def test_a_mistyped_variable_is_refused_with_a_suggestion(monkeypatch):
    monkeypatch.setenv("VCACHE_SERVER_ENDPOINT", "ipc:///x")
    assert refusal() == (
        "VCACHE_SERVER_ENDPOINT = 'ipc:///x' (from the environment): there is no such setting; "
        "did you mean VCACHE_SERVER__ENDPOINT?"
    )


def test_a_variable_like_nothing_we_know_is_refused_too(monkeypatch):
    monkeypatch.setenv("VCACHE_ZZZ", "1")
    assert "VCACHE_ZZZ" in refusal()


@pytest.mark.parametrize(
    "name", ["VCACHE_SERVICE_HOST", "VCACHE_SERVER_SERVICE_PORT_ZMQ", "VCACHE_PORT", "VCACHE_SERVER_PORT_5555_TCP_ADDR"]
)
def test_what_kubernetes_puts_into_a_container_is_no_typo(monkeypatch, name):
    monkeypatch.setenv(name, "tcp://10.0.0.1:5555")
    assert VCacheConfig() == VCacheConfig.load()


def test_all_problems_of_all_sources_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VCACHE_BLOK_SIZE", "16")
    text = refusal(written(tmp_path, "segment: {size: 8G}\nlog_level: LOUD\n"), chunksize=3)
    assert all(part in text for part in ("VCACHE_BLOCK_SIZE?", "8GiB", "'LOUD'", "'DEBUG'", "chunksize", "chunk_size?"))
    assert len(text.splitlines()) == 4


# --- bad values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("chunk_size", 0, "greater than or equal to 1"),
        ("chunk_size", "many", "must be a whole number such as 256"),
        ("chunk_size", True, "a number is needed, not yes/no"),
        ("chunk_size", 256.5, "must be a whole number such as 256"),
        ("segment.records", "many", "must be a whole number such as 4"),
        ("server.eviction.pull", "maybe", "must be true or false"),
        ("server.eviction.pull", 3, "must be true or false"),
        ("log_level", "LOUD", "'DEBUG', 'INFO'"),
        ("server.heartbeat_interval", "soon", "such as 500ms or 10s"),
        ("server.heartbeat_interval", 0, "greater than 0"),
        ("server.max_lease", "48h", "less than or equal to 86400s"),
        ("server.max_message_bytes", "64MiB", "less than or equal to 4MiB"),
        ("server.max_message_bytes", "64KiB", "greater than or equal to 512KiB"),  # the keys of one call fit
        ("server.placement", "random", "'local_first' or 'most_free'"),
        ("server.eviction.policy", "fifo", "'lru'"),
        ("server.eviction.high_watermark", 1.5, "less than or equal to 1"),
        ("server.eviction.low_watermark", "half", "must be a number such as 0.9"),
        ("segment.size", "8G", "8GiB"),
        ("segment.size", 4096, "greater than or equal to 1MiB"),
        ("segment.records", -1, "greater than or equal to 0"),
        ("segment.tier", "hbm", "'auto', 'vram' or 'dram'"),
        ("transfer.threads", 65, "less than or equal to 64"),
        ("store.kind", "s3", "'none'"),
        ("store.mooncake.soft_pin", True, "such as 500ms or 10s"),
        ("server.endpoint", 5, "must be text; put it in quotes"),
        ("chunk_size", None, "has no value; write one, or leave the line out"),
        ("runtime_dir", ["a"], "must be text; put it in quotes"),
    ],
)
def test_a_bad_value_is_refused_with_field_value_origin_and_fix(tmp_path, name, value, fix):
    *sections, leaf = name.split(".")
    tree = {leaf: value}
    for section in reversed(sections):
        tree = {section: tree}
    path = written(tmp_path, yaml.safe_dump(tree))
    text = refusal(path)
    assert text.startswith(f"{name} = {value!r} (from {path}:{len(sections) + 1}): ")
    assert fix in text


def test_a_value_where_a_section_is_needed_is_refused():
    words = "(from argument): a section of settings, not a value; set one of them, such as"
    assert refusal(server=3) == f"server = 3 {words} server.endpoint"
    assert refusal(store="none") == f"store = 'none' {words} store.kind"
    assert refusal(server={"curve": "x"}) == f"server.curve = 'x' {words} server.curve.server_public_key_file"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n", "`name: value` lines"),
        ("chunk_size: [", "not valid YAML"),
        ("chunk_size: 1\nchunk_size: 2\n", "already set in"),
        ("chunk_size: !!python/object/apply:os.getpid []\n", "not a plain value"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, text, part):
    path = written(tmp_path, text)
    message = refusal(path)
    assert part in message
    assert str(path) in message


def test_a_missing_or_unreadable_file_is_refused(tmp_path, monkeypatch):
    assert "cannot be read" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    monkeypatch.setenv("VCACHE_CONFIG_FILE", str(tmp_path / "absent.yaml"))
    assert "absent.yaml" in refusal()


def test_a_configuration_error_is_also_a_value_error_of_ours():
    assert issubclass(ConfigError, VCacheError)
    assert issubclass(ConfigError, ValueError)


# --- contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk_size": 250}, "chunk_size = 250: must be a multiple of block_size = 16; use 240 or 256"),
        ({"chunk_size": 8}, "use 16,"),
        (
            {"server": {"eviction": {"low_watermark": 0.95}}},
            "must be below server.eviction.high_watermark = 0.95, at which it begins",
        ),
        (
            {"server": {"liveness_timeout": "2s"}},
            "server.liveness_timeout = 2s: must be at least 3 times server.heartbeat_interval = 1s; use 3s or more",
        ),
        ({"client": {"lease": "2min"}}, "client.lease = 120s: longer than server.max_lease = 60s"),
        (
            {"segment": {"size": "2MB"}},
            "segment.size = 2000000: must be a multiple of 4096 bytes (a page); use 1998848",
        ),
        (
            {"segment": {"size": "1MiB", "records": 8192}},
            "segment.records = 8192: their directory leaves no room for data in segment.size = 1MiB",
        ),
        ({"runtime_dir": "here"}, "runtime_dir = 'here': must be an absolute path"),
    ],
)
def test_contradictions_are_refused_naming_both_sides(settings, words):
    assert words in refusal(**settings)


def test_a_contradiction_tells_where_both_sides_were_set(tmp_path, monkeypatch):
    path = written(tmp_path, "client:\n  lease: 2min\nchunk_size: 250\n")
    monkeypatch.setenv("VCACHE_SERVER__MAX_LEASE", "90s")
    chunk, lease = refusal(path).splitlines()
    assert chunk.endswith(f"or another block_size (chunk_size from {path}:3)")
    assert lease.endswith(f"(client.lease from {path}:2, server.max_lease from VCACHE_SERVER__MAX_LEASE)")


def test_a_directory_that_just_leaves_room_is_accepted():
    fits = ((1 << 20) - 8192) // 128
    assert VCacheConfig(segment={"size": "1MiB", "records": fits}).segment.records == fits
    assert "segment.records" in refusal(segment={"size": "1MiB", "records": fits + 1})


# --- where the server is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "kind"),
    [
        ({}, "none"),
        ({"files": {"directory": "/mnt/vcache"}}, "files"),
        ({"files": {"directory": "/mnt/vcache"}, "mooncake": {"master": "127.0.0.1:50051"}}, "mooncake"),
        ({"kind": "files", "files": {"directory": "/mnt/vcache"}, "mooncake": {"master": "127.0.0.1:50051"}}, "files"),
        ({"kind": "none", "files": {"directory": "/mnt/vcache"}}, "none"),
    ],
)
def test_which_store_lies_below_follows_from_what_is_configured(store, kind):
    assert VCacheConfig(store=store).store.resolved_kind == kind


def test_the_endpoint_is_a_socket_in_the_runtime_directory_by_default():
    assert VCacheConfig().endpoint == f"ipc:///dev/shm/vcache-{os.getuid()}/server.sock"
    assert VCacheConfig(runtime_dir="/run/x").endpoint == "ipc:///run/x/server.sock"
    assert VCacheConfig(server={"endpoint": "tcp://127.0.0.1:5555"}).endpoint == "tcp://127.0.0.1:5555"


def test_the_limit_of_a_socket_path_is_met_exactly():
    fits = "/" + "r" * (107 - len("/" + "/server.sock"))
    assert VCacheConfig(runtime_dir=fits).endpoint.endswith("/server.sock")
    text = refusal(runtime_dir=fits + "r")
    assert re.search("runtime_dir = .* has 108 bytes, the system allows 107; use a shorter runtime_dir", text)
    assert "server.endpoint = " in refusal(server={"endpoint": "ipc:///" + "é" * 54})


@pytest.mark.parametrize(
    "endpoint",
    [
        "server",
        "ipc://server.sock",
        "ipc://@abstract",
        "ipc://*",
        "http://127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1:²",
        "tcp://127.0.0.1:*",
        "tcp://:5555",
        "tcp://::1:5555",
    ],
)
def test_a_malformed_endpoint_is_refused(endpoint):
    text = refusal(server={"endpoint": endpoint})
    assert text.startswith(f"server.endpoint = {endpoint!r}: ")
    assert "ipc:///" in text


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "tcp://127.9.9.9:5", "tcp://[::1]:5", "tcp://localhost:5"])
def test_loopback_needs_no_keys(endpoint):
    assert not VCacheConfig(server={"endpoint": endpoint}).is_beyond_host


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5", "tcp://*:5", "tcp://10.0.0.1:5", "tcp://[::]:5", "tcp://eth0:5", "tcp://gpu-7:5"]
)
def test_beyond_the_host_keys_are_needed(endpoint):
    text = refusal(server={"endpoint": endpoint})
    assert (
        f"server.endpoint = {endpoint!r}: reachable beyond this host, which needs CURVE keys; run `vcache keys" in text
    )
    serves = {"server_secret_key_file": "/k/server.key_secret", "authorized_clients_dir": "/k/clients"}
    calls = {"server_public_key_file": "/k/server.key", "client_secret_key_file": "/k/clients/me.key_secret"}
    for curve in (serves, calls):
        assert VCacheConfig(server={"endpoint": endpoint, "curve": curve}).is_beyond_host
    assert "CURVE" in refusal(server={"endpoint": endpoint, "curve": {"server_public_key_file": "/k/server.key"}})
