"""Finds what VCache must never use: whatever unpickles or evaluates data (nothing that came from elsewhere ever is).

Reads the syntax tree of every ``*.py`` below the paths given, prints a line per finding; exit status 1 if there is one.
It stops mistakes, not malice: a name put together at run time is not seen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

MODULES: Final = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
BUILTINS: Final = frozenset({"eval", "exec"})
IMPORTERS: Final = frozenset({"__import__", "import_module"})
#: By module and name. ``torch.load`` has been talked into unpickling even where it promised not to.
FUNCTIONS: Final = frozenset(
    {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "load_all"), ("yaml", "full_load")}
    | {("yaml", "unsafe_load"), ("yaml", "unsafe_load_all"), ("builtins", "eval"), ("builtins", "exec")}
)
#: pyzmq's sockets pickle in these.
METHODS: Final = frozenset({"recv_pyobj", "send_pyobj"})


class Finding(NamedTuple):
    """Something forbidden, and where."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what} is forbidden: it unpickles or evaluates data"


def findings(source: str, path: Path) -> Iterator[Finding]:
    """Everything forbidden in one file's text. Raises ``SyntaxError`` when it is not Python."""
    for node in ast.walk(ast.parse(source, filename=str(path))):
        for what in _forbidden(node):
            yield Finding(path, getattr(node, "lineno", 0), what)


def _forbidden(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (f"import {name.name}" for name in names if _root(name.name) in MODULES)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            if _root(module) in MODULES:
                yield f"import of {module}"
            yield from (f"{module}.{name.name}" for name in names if (_root(module), name.name) in FUNCTIONS)
            yield from (f"import of {name.name}" for name in names if name.name in MODULES)
        case ast.Name(id=name) if name in BUILTINS:
            yield name
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in FUNCTIONS:
            yield f"{owner}.{name}"
        case ast.Attribute(attr=name) if name in METHODS:
            yield name
        case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]) if _last_name(function) in IMPORTERS:
            if _root(module) in MODULES:
                yield f"import of {module}"
        case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
            yield "allow_pickle"


def _root(module: str) -> str:
    return module.partition(".")[0]


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def main(arguments: list[str]) -> int:
    """Checks every file below ``arguments``; the exit status."""
    files = [path for argument in arguments for path in sorted(Path(argument).rglob("*.py"))]
    if not files:
        print("check_forbidden: no Python file below", *arguments, file=sys.stderr)
        return 2
    found = [finding for path in files for finding in findings(path.read_text(encoding="utf-8"), path)]
    for finding in found:
        print(finding, file=sys.stderr)
    print(f"check_forbidden: {len(files)} files, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
