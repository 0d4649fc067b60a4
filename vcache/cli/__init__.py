"""The ``vcache`` command. ``main`` is imported lazily, so that ``vcache --help`` is quick."""


def main() -> None:
    """Runs the command line (the console script)."""
    from vcache.cli.app import run

    run()
