"""``python -m vcache.cli``: the ``vcache`` command where it was not installed."""

from vcache.cli import main

main()
