"""The functions in C, found where the package was built and called through ctypes: without the GIL, without a Python header."""

from __future__ import annotations

import ctypes
import importlib.util


def native_library(name: str) -> ctypes.CDLL:
    """The library that ``setup.py`` builds as the module ``name``. ``ImportError`` says how to build it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ImportError(
            f"{name} is not built: install the package (`pip install .`, or `make environment`), or build it in place "
            "with `python setup.py build_ext --inplace`; either needs a C compiler"
        )
    return ctypes.CDLL(found.origin)
