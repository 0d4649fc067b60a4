"""The kinds of values that settings have, and what a section of settings is."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vcache.units import format_duration, format_size, parse_duration, parse_size

_DAY_S: Final = 86_400.0


class Unit(NamedTuple):
    """Marks a field whose number people write with a unit; says how to write it back."""

    kind: Literal["size", "duration"]

    def text(self, value: Any) -> str:
        return format_size(value) if self.kind == "size" else format_duration(value)


def _not_a_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not yes/no")  # YAML's yes and on would silently become 1
    return value


Size = Annotated[int, BeforeValidator(parse_size), Unit("size")]
Seconds = Annotated[float, Field(gt=0, le=_DAY_S), BeforeValidator(parse_duration), Unit("duration")]
#: 0 stands for never.
SecondsOrNever = Annotated[float, Field(ge=0, le=_DAY_S), BeforeValidator(parse_duration), Unit("duration")]
Count = Annotated[int, BeforeValidator(_not_a_flag)]
Fraction = Annotated[float, Field(gt=0, le=1), BeforeValidator(_not_a_flag)]


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)
