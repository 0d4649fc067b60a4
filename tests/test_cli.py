"""The vcache command as a person uses it: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import msgspec
import pytest

from tests.support.processes import PATIENCE_S, REPOSITORY, child_environment
from vcache.cli.status import rates_between
from vcache.config import VCacheConfig
from vcache.curve import authorized_clients, server_key_pair
from vcache.protocol import ServerStats
from vcache.settings_sources import setting_fields

COMMANDS = ("server", "donate", "status", "doctor", "config", "keys", "demo", "bench")


def vcache(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vcache.cli", *arguments],
        env=child_environment(extra={"COLUMNS": "160", **environment}),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_help_names_every_command():
    text = vcache("--help").stdout
    assert all(f" {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", ["server", "donate", "status", "doctor", "keys", "demo", "config show"])
def test_each_command_explains_itself(command):
    assert "Usage: " in vcache(*command.split(), "--help").stdout


def test_an_unknown_command_or_option_is_a_usage_error():
    assert "No such command" in vcache("sevrer", status=2).stderr
    assert "No such option" in vcache("status", "--jsn", status=2).stderr


def test_version_is_that_of_the_package():
    import vcache as package

    assert vcache("--version").stdout == f"vcache {package.__version__}\n"


def test_a_table_that_goes_into_a_pipe_is_not_broken_into_lines():
    directory = "/dev/shm/" + "long-" * 12
    shown = vcache("config", "show", COLUMNS="", VCACHE_RUNTIME_DIR=directory).stdout.splitlines()
    assert shown[1].split() == ["runtime_dir", directory, "VCACHE_RUNTIME_DIR"]
    assert f"ipc://{directory}/server.sock" in shown[-2]


def test_help_loads_nothing_heavy():
    ask = (
        "import sys\nfrom vcache.cli.app import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'numpy', 'zmq', 'pydantic', 'yaml', 'vllm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- config ------------------------------------------------------------------------------------------------------------


def test_config_show_tells_every_value_and_its_origin(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("block_size: 32\nsegment:\n  size: 8GiB\n")
    done = vcache("config", "show", "--config", str(path), "--set", "client.lease=5s", VCACHE_LOG_LEVEL="debug")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["block_size"] == ["block_size", "32", f"{path}:1"]
    assert rows["segment.size"] == ["segment.size", "8GiB", f"{path}:3"]
    assert rows["client.lease"] == ["client.lease", "5s", "argument"]
    assert rows["log_level"] == ["log_level", "DEBUG", "VCACHE_LOG_LEVEL"]
    assert rows["chunk_size"] == ["chunk_size", "256", "default"]


def test_config_show_as_json_has_all_settings():
    shown = json.loads(vcache("config", "show", "--json").stdout)
    assert list(shown) == [name for name, _ in setting_fields(VCacheConfig)]
    assert shown["segment.size"] == {"value": "1GiB", "origin": "default"}


def test_config_check_accepts_the_documented_file():
    assert vcache("config", "check", "system_config.yaml").stdout.endswith("system_config.yaml: ok\n")


def test_config_check_refuses_with_every_problem_on_stderr_and_status_2(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("chunk_size: 100\nserver:\n  hartbeat_interval: 1s\n")
    done = vcache("config", "check", str(path), status=2)
    assert f"server.hartbeat_interval (from {path}:3)" in done.stderr
    assert "use 96 or 112" in done.stderr
    assert done.stdout == ""


def test_config_check_looks_whether_this_machine_has_what_the_file_needs(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"store:\n  files:\n    directory: {tmp_path}/mount/vcache\n")
    done = vcache("config", "check", str(path), status=2)
    assert f"store.files.directory = '{tmp_path}/mount/vcache': {tmp_path}/mount is not there" in done.stderr
    assert done.stdout == ""
    (tmp_path / "mount").mkdir()
    assert vcache("config", "check", str(path)).stdout.endswith("my.yaml: ok\n")


def test_config_check_looks_at_the_key_files_that_are_named(tmp_path):
    keys, path = tmp_path / "keys", tmp_path / "my.yaml"
    curve = {
        "server_public_key_file": f"{keys}/server.key",
        "server_secret_key_file": f"{keys}/server.key_secret",
        "client_secret_key_file": f"{keys}/clients/me.key_secret",
        "authorized_clients_dir": f"{keys}/clients",
    }
    path.write_text(json.dumps({"server": {"endpoint": "tcp://10.0.0.1:5555", "curve": curve}}))
    done = vcache("config", "check", str(path), status=2)
    for name, value in curve.items():
        assert f"server.curve.{name} = '{value}': not a " in done.stderr
    assert done.stdout == ""
    vcache("keys", str(keys), "--client", "me")
    assert vcache("config", "check", str(path)).stdout.endswith("my.yaml: ok\n")


def test_set_wants_a_name_and_a_value():
    assert "is not NAME=VALUE" in vcache("config", "show", "--set", "chunk_size", status=2).stderr


@pytest.mark.parametrize("order", [1, -1])
def test_set_wants_settings_not_sections(order):
    both = ["server=foo", "server.endpoint=ipc:///x"][::order]
    done = vcache("config", "show", "--set", both[0], "--set", both[1], status=2)
    assert "server = 'foo' (from argument): a section of settings, not a value" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server: " + "[" * 5000, "nested too deeply"),
        ("chunk_size: 2020-13-45", "chunk_size (from {path}:1): not a plain value: month must be in 1..12"),
        ("chunk_size: !!int abc", "chunk_size (from {path}:1): not a plain value"),
        ("chunk_size: !!timestamp abc", "chunk_size (from {path}:1): not a plain value"),
        ("? [a, b]\n: 1", "{path}:1: the name of a setting is a plain word"),
        ("segment: {size: 1e400}", "segment.size = '1e400' (from {path}:1): not a whole number of bytes"),
    ],
)
def test_a_file_that_is_no_settings_is_told_in_a_line(tmp_path, text, words):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    done = vcache("config", "check", str(path), status=2)
    assert words.format(path=path) in done.stderr
    assert "Traceback" not in done.stderr


def test_brackets_in_a_value_are_shown_and_no_markup():
    odd = "/dev/shm/[/bold]:smile:[red]"
    assert f"ipc://{odd}/server.sock" in vcache("config", "show", VCACHE_RUNTIME_DIR=odd).stdout


# --- keys --------------------------------------------------------------------------------------------------------------


def test_keys_makes_what_server_and_clients_need(tmp_path):
    directory = tmp_path / "keys"
    done = vcache("keys", str(directory), "--client", "worker-1", "--client", "worker-2")
    secrets = [directory / "server.key_secret", *(directory / "clients").glob("*.key_secret")]
    assert len(secrets) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    curve = {"server_secret_key_file": str(secrets[0]), "authorized_clients_dir": str(directory / "clients")}
    config = VCacheConfig(server={"endpoint": "tcp://0.0.0.0:5555", "curve": curve})
    assert server_key_pair(config) is not None
    assert len(authorized_clients(config)) == 2
    assert all(path in done.stdout for path in curve.values())


def test_keys_adds_clients_but_replaces_nothing(tmp_path):
    vcache("keys", str(tmp_path))
    before = (tmp_path / "server.key_secret").read_text()
    vcache("keys", str(tmp_path), "--client", "another")
    assert (tmp_path / "server.key_secret").read_text() == before
    again = vcache("keys", str(tmp_path), "--client", "third", "--client", "third", "--client", "client", status=1)
    assert "has keys of client already; nothing was replaced" in again.stderr
    assert not list(tmp_path.glob("clients/third*"))  # all or none
    vcache("keys", str(tmp_path), "--client", "third", "--client", "third")


def test_keys_takes_no_path_for_a_name(tmp_path):
    assert "letters, digits" in vcache("keys", str(tmp_path), "--client", "../evil", status=2).stderr


# --- status ------------------------------------------------------------------------------------------------------------


def test_status_says_that_no_server_answers_with_status_3(runtime_dir):
    done = vcache("status", "--timeout", "200ms", status=3)
    assert f"no metadata server answered at ipc://{runtime_dir}/server.sock" in done.stderr
    assert "vcache server" in done.stderr


@pytest.mark.parametrize("command", ["status", "doctor"])
@pytest.mark.parametrize("timeout", ["nan", "-1", "1e300", "soon"])
def test_a_timeout_that_cannot_be_waited_for_is_a_usage_error(command, timeout):
    assert "Invalid value for --timeout" in vcache(command, f"--timeout={timeout}", status=2).stderr


def test_status_shows_a_running_server(server, runtime_dir):
    text = vcache("status", "--interval", "0").stdout
    assert f"ipc://{runtime_dir}/server.sock" in text
    assert "0 entries, 0 leases, 0 reservations, 0 pins, 0 sessions, 0 segments" in text


def test_status_as_json_has_term_segments_counters_and_rates(server, runtime_dir):
    shown = json.loads(vcache("status", "--json", "--interval", "50ms").stdout)
    assert shown["endpoint"] == f"ipc://{runtime_dir}/server.sock"
    assert shown["term"] > 0
    assert shown["segments"] == []
    assert shown["entries"] == shown["leases"] == 0
    assert shown["rates_per_s"].keys() == shown["counters"].keys()


def test_rates_are_growth_over_the_server_s_own_time_and_end_at_a_restart():
    def sample(**values) -> ServerStats:
        empty = dict.fromkeys(("entries", "leases", "reservations", "pins", "sessions"), 0)
        return ServerStats(id=1, segments=[], **empty | {"term": 7} | values)

    first = sample(uptime_s=10.0, counters={"hits": 100, "misses": 5})
    second = sample(uptime_s=12.0, counters={"hits": 300, "misses": 5, "evictions": 4})
    assert rates_between(first, second) == {"hits": 100.0, "misses": 0.0, "evictions": 2.0}
    assert rates_between(first, first) == {}
    assert rates_between(first, msgspec.structs.replace(second, term=8)) == {}


# --- server ------------------------------------------------------------------------------------------------------------


def test_server_becomes_the_metadata_server_with_the_configuration_of_the_command_line(runtime_dir, processes):
    endpoint = f"ipc://{runtime_dir}/another.sock"
    child = processes.python("-m", "vcache.cli", "server", "--endpoint", endpoint)
    shown = json.loads(vcache("status", "--json", "--interval", "0", "--endpoint", endpoint, "--timeout", "30s").stdout)
    assert shown["endpoint"] == endpoint
    assert child.stop() == 0


def test_server_keeps_what_lies_where_its_socket_should(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    done = vcache("server", "--endpoint", f"ipc://{path}", status=2)
    assert f"server.endpoint = 'ipc://{path}': {path} is there and no socket" in done.stderr
    assert path.read_text() == "mine"


def test_server_beyond_the_host_without_keys_is_refused_and_told_how(runtime_dir):
    done = vcache("server", "--endpoint", "tcp://0.0.0.0:5555", status=2)
    assert "reachable beyond this host" in done.stderr
    assert "vcache keys DIR" in done.stderr


# --- bench -------------------------------------------------------------------------------------------------------------


def test_bench_hands_its_arguments_to_the_benchmarks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vcache.cli", "bench", "--help"],
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--quick" in done.stdout
