"""The example of the documentation runs, and shows what it says."""

from __future__ import annotations


def test_the_python_api_example_runs(pool, processes):
    child = processes.python("examples/python_api.py", config=pool)
    assert child.wait() == 0, child.report()
    assert child.printed == [
        "lookup before: 0 tokens",
        "stored:        2 chunks",
        "lookup after:  512 tokens",
        "loaded:        512 tokens",
        "same bytes:    True",
    ]


def test_without_a_server_the_example_says_what_to_start(config, processes):
    child = processes.python("examples/python_api.py", config=config, extra={"VCACHE_CLIENT__CONNECT_TIMEOUT": "100ms"})
    assert child.wait() == 1
    assert "start one with `vcache server`" in child.report()
