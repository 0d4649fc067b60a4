"""Where settings come from: a YAML file, the environment, arguments; each remembers the origin of every value.

Settings are named by dotted paths ("server.eviction.policy"). What the settings *are* and whether their values fit
together is ``vcache/config.py``'s business.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

ENV_PREFIX: Final = "VCACHE_"
ENV_DELIMITER: Final = "__"
ENV_CONFIG_FILE: Final = "VCACHE_CONFIG_FILE"
#: What Kubernetes puts into every container for a service whose name starts with "vcache": not ours, and no typos.
_SERVICE_LINKS: Final = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$")


def setting_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below ``model`` as (dotted name, field), sections left out."""
    for name, field in model.model_fields.items():
        if is_section(field):
            yield from setting_fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", field


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds further settings instead of a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def environment_name(name: str) -> str:
    """The environment variable of a setting: "server.endpoint" -> "VCACHE_SERVER__ENDPOINT"."""
    return ENV_PREFIX + name.upper().replace(".", ENV_DELIMITER)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names of settings to nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return tree


class Source(PydanticBaseSettingsSource):
    """Values by dotted name; pydantic-settings merges what ``__call__`` returns.

    ``origins`` says where each value stands, ``problems`` what could not be used, in words for an error.
    """

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings)
        self.known = dict(setting_fields(settings))
        self.sections = {name.rpartition(".")[0] for name in self.known} - {""}
        self.sections |= {section.rpartition(".")[0] for section in self.sections} - {""}
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def __call__(self) -> dict[str, Any]:
        return _nested(self.values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of pydantic-settings' interface; unused, because ``__call__`` builds the whole tree."""
        return self.values.get(field_name), field_name, False

    def _accept(self, name: str, value: Any, origin: str) -> None:
        if name in self.known:
            self.values[name] = value
            self.origins[name] = origin
        else:
            self.problems.append(f"{name} (from {origin}): there is no such setting{self._suggestion(name)}")

    def _walk(self, tree: Mapping[Any, Any], prefix: str, origin: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if name not in self.sections:
                self._accept(name, value, origin)
            elif isinstance(value, BaseModel):
                self._walk(value.model_dump(exclude_unset=True), f"{name}.", origin)
            elif isinstance(value, Mapping):
                self._walk(value, f"{name}.", origin)
            elif value is not None:
                inside = next(known for known in self.known if known.startswith(f"{name}."))
                self.problems.append(
                    f"{name} = {value!r} (from {origin}): a section of settings, not a value; set one of them, such as {inside}"
                )

    def _suggestion(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.known, n=1, cutoff=0.75)
        if not close:
            leaf = name.rpartition(".")[2]
            leaves = {known.rpartition(".")[2]: known for known in self.known}
            close = [leaves[found] for found in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)]
        return f"; did you mean {close[0]}?" if close else "; `vcache config show` lists all of them"


class ArgumentSource(Source):
    """Arguments of the constructor, dotted or nested; ``None`` counts as not given."""

    def __init__(self, settings: type[BaseSettings], arguments: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._walk({name: value for name, value in arguments.items() if value is not None}, "", "argument")


class EnvironmentSource(Source):
    """``VCACHE_*`` variables, sections joined by ``__``; an empty one counts as not set."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings)
        names = {environment_name(name): name for name in self.known}
        for variable, value in sorted(os.environ.items()):
            if not variable.startswith(ENV_PREFIX) or variable == ENV_CONFIG_FILE or not value:
                continue
            if variable in names:
                self._accept(names[variable], value, variable)
            elif not _SERVICE_LINKS.search(variable):
                close = difflib.get_close_matches(variable, [*names, ENV_CONFIG_FILE], n=1, cutoff=0.75)
                fix = f"did you mean {close[0]}?" if close else "unset it, or see `vcache config show` for the names"
                self.problems.append(f"{variable} = {value!r} (from the environment): there is no such setting; {fix}")


class FileSource(Source):
    """A YAML file of settings; ``None`` is an empty one."""

    def __init__(self, settings: type[BaseSettings], path: Path | None) -> None:
        super().__init__(settings)
        if path is None:
            return
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: cannot be read ({error}); give the path of a YAML file")
            return
        except yaml.YAMLError as error:
            self.problems.append(f"{path}: not valid YAML: {error}")
            return
        except RecursionError:
            self.problems.append(f"{path}: nested too deeply for settings, which have a few levels")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self.problems.append(f"{path}: must hold `name: value` lines at the top, as system_config.yaml does")
            return
        self._walk_nodes(root, "", path)

    def _walk_nodes(self, tree: yaml.MappingNode, prefix: str, path: Path) -> None:
        seen: dict[str, str] = {}
        for key, node in tree.value:
            origin = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{origin}: the name of a setting is a plain word, not a list or a mapping")
                continue
            name = f"{prefix}{key.value}"
            if name in seen:
                self.problems.append(f"{name} (from {origin}): already set in {seen[name]}; keep one of the two")
                continue
            seen[name] = origin
            if name in self.sections and isinstance(node, yaml.MappingNode):
                self._walk_nodes(node, f"{name}.", path)
                continue
            try:
                value = yaml.constructor.SafeConstructor().construct_document(node)
            except (
                yaml.YAMLError,
                ValueError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:  # tags of YAML's own
                self.problems.append(f"{name} (from {origin}): not a plain value: {error}")
            else:
                self._walk({key.value: value}, prefix, origin)
