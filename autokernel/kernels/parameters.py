"""Kernels' configs as entries spell them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Self, get_args

from autokernel.records import ConfigValue

Precision = Literal["ieee", "tf32x3"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {"int": int, "bool": bool}  # by the field's annotation; others stay


class Parameters:
    """Configs that are read from entries, whose names are those of search_spaces/ in any case. A base of dataclasses."""

    @classmethod
    def from_entry(cls, config: Mapping[str, ConfigValue]) -> Self:
        """From a candidate's config without its `kernel`.

        Raises:
            ValueError: a parameter is missing or unknown.
        """
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        given: dict[str, Any] = {name.lower(): value for name, value in config.items()}
        unknown = sorted(set(given) - set(known))
        missing = sorted(name for name, field in known.items() if name not in given and field.default is MISSING)
        if unknown or missing:
            raise ValueError(
                f"{cls.__name__} takes {', '.join(known)}; unknown: {', '.join(unknown) or 'none'}, "
                f"missing: {', '.join(missing) or 'none'}"
            )
        return cls(**{name: _CONVERSIONS.get(str(known[name].type), _same)(value) for name, value in given.items()})


def precision_problem(precision: str) -> str | None:
    """What is wrong with a precision of products in fp32, None if nothing is."""
    return None if precision in PRECISIONS else f"precision must be one of {', '.join(PRECISIONS)}; it is {precision}"


def power_of_two(number: int) -> int:
    """The least one that is not less."""
    return 1 << max(0, number - 1).bit_length()


def is_power_of_two(number: int) -> bool:
    """Whether it is one: 1, 2, 4, ..."""
    return number >= 1 and number & (number - 1) == 0


def _same(value: Any) -> Any:
    return value
