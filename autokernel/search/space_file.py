"""Reading `search_spaces/<op>.yaml` into `Space` objects; every mistake is an error that names file, key, value and cure.

op: mm
doc: what this space is about
names: [m, n, k, dtype_bytes]        # names of the problem that expressions below read (`Op.dims` gives them)
backends:
  inductor:
    cpu:                              # one section per kind of device: cpu, cuda
      choices:
        template: [cpp_gemm]          # a list of values; `{expr: threads}` inside it is computed
        threads_m: {divisors: threads, also: [0]}
        block_m: {range: [1, 32], log2: true}     # 1, 2, 4, ..., 32; without log2: every integer, or each `step`-th
      when: {group_m: template == "mm"}           # the parameter exists only where this holds
      constraints: [block_m * 16 <= m]
      default: {template: cpp_gemm, threads_m: 0, block_m: 1}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autokernel.config import BACKENDS, parse_yaml_mapping
from autokernel.config_messages import mistakes, suggestion
from autokernel.errors import ConfigError
from autokernel.records import ConfigValue
from autokernel.search.expressions import Expression, parse_expression
from autokernel.search.space import DEVICE_NAMES, Names, Parameter, Section, Space

COPY = "copy the package's search_spaces/ and change the copy"  # the cure for what a folder of one's own lacks

_MAX_CHOICES = 1024


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SectionFile(_Part):
    """One backend on one kind of device."""

    choices: dict[str, Any] = Field(min_length=1, description="parameter -> its values")
    when: dict[str, str] = Field(default_factory=dict, description="parameter -> expression; absent where it is false")
    constraints: list[str] = Field(default_factory=list, description="expressions that every config must satisfy")
    default: dict[str, Any] = Field(description="the stock choice; the first seed")


class BackendFile(_Part):
    """One backend."""

    cpu: SectionFile | None = None
    cuda: SectionFile | None = None


class SpaceFile(_Part):
    """One file of search_spaces/."""

    op: str
    doc: str = ""
    names: list[str] = Field(default_factory=list, description="names of the problem that expressions read")
    backends: dict[str, BackendFile] = Field(min_length=1)


def default_spaces_folder() -> Path:
    """Where the package's own spaces lie: inside an installed package, or beside it in a checkout.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "search_spaces", package.parent / "search_spaces"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"{package}: the package has no search_spaces folder: install it from its checkout again (pip install -c "
        "constraints.txt -e .), or name a folder in `search.spaces`"
    )


def load_space(op: str, folder: Path | None = None) -> dict[str, Space]:
    """The spaces of an op by backend.

    Args:
        op: name of the op; the file is `<folder>/<op>.yaml`.
        folder: default: the package's own.

    Raises:
        ConfigError: names the file, the key's path, the value and the cure.
    """
    folder = default_spaces_folder() if folder is None else folder
    path = folder / f"{op}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no search space for op {op}; the folder has spaces for: {known}; {COPY}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    data = parse_yaml_mapping(text, path)
    try:
        file = SpaceFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes(error, SpaceFile, data))) from None
    if file.op != op:
        raise ConfigError(f"{path}: op: is {file.op!r}, but the file is named for {op!r}; make them equal")
    for name in file.backends:
        if name not in BACKENDS:  # its space would be read by nobody
            raise ConfigError(f"{path}: backends.{name}: is none of {', '.join(BACKENDS)}{suggestion(name, BACKENDS, '`')}")
    reserved = sorted(set(file.names) & DEVICE_NAMES)
    if reserved:
        raise ConfigError(f"{path}: names: {', '.join(reserved)} belong to the device and are always known; remove them")
    return {name: _space(file, name, path) for name in file.backends}


def _space(file: SpaceFile, backend: str, path: Path) -> Space:
    sections: dict[str, Section] = {}
    for device in ("cpu", "cuda"):
        part: SectionFile | None = getattr(file.backends[backend], device)
        if part is not None:
            where = f"{path}: backends.{backend}.{device}"
            sections[device] = _SectionReader(part, frozenset(file.names) | DEVICE_NAMES, where).read()
    where = f"{path}: backends.{backend}"
    if not sections:
        raise ConfigError(f"{where}: has no section; give it `cpu:` or `cuda:` with choices and default")
    return Space(op=file.op, backend=backend, where=where, names=frozenset(file.names), sections=sections)


class _SectionReader:
    def __init__(self, part: SectionFile, names: frozenset[str], where: str) -> None:
        self.part = part
        self.names = names
        self.where = where

    def read(self) -> Section:
        part = self.part
        clash = sorted(set(part.choices) & self.names)
        if clash:
            raise ConfigError(f"{self.where}.choices.{clash[0]}: is also a name of the problem or device; call it differently")
        for key, given in (("when", part.when), ("default", part.default)):
            for name in given:
                if name not in part.choices:
                    raise ConfigError(f"{self.where}.{key}.{name}: {self._unknown(name)}")
        parameters: list[Parameter] = []
        for name, spec in part.choices.items():
            choices, ordered = self._choices(spec, f"{self.where}.choices.{name}")
            when = None
            if name in part.when:
                # only what is chosen before: so a config can be read from its first parameter to its last
                earlier = self.names | {p.name for p in parameters}
                when = parse_expression(part.when[name], allowed=earlier, where=f"{self.where}.when.{name}")
            parameters.append(Parameter(name=name, choices=choices, ordered=ordered, when=when))
        constraints = tuple(
            parse_expression(text, allowed=self.names | set(part.choices), where=f"{self.where}.constraints[{i}]")
            for i, text in enumerate(part.constraints)
        )
        return Section(parameters=tuple(parameters), constraints=constraints, default=self._default())

    def _default(self) -> dict[str, ConfigValue | Expression]:
        missing = [name for name in self.part.choices if name not in self.part.default and name not in self.part.when]
        if missing:
            raise ConfigError(f"{self.where}.default: lacks {', '.join(missing)}; give every parameter that is always there")
        default: dict[str, ConfigValue | Expression] = {}
        for name, value in self.part.default.items():
            where = f"{self.where}.default.{name}"
            default[name] = self._value(value, where)
            spec = self.part.choices[name]
            if isinstance(spec, list) and not isinstance(value, dict) and not any(isinstance(item, dict) for item in spec):
                same = [item for item in spec if item == value and isinstance(item, bool) == isinstance(value, bool)]
                if not same:
                    raise ConfigError(f"{where}: {value!r} is not among the choices {spec}")
        return default

    def _unknown(self, name: str) -> str:
        cure = suggestion(name, self.part.choices, "`") or f"; choices has {', '.join(self.part.choices)}"
        return f"no such parameter{cure}"

    def _expression(self, text: Any, where: str) -> Expression:
        if isinstance(text, bool) or not isinstance(text, (int, str)):
            raise ConfigError(f"{where}: must be a whole number or an expression, not {text!r}")
        return parse_expression(str(text), allowed=self.names, where=where)

    def _value(self, value: Any, where: str) -> ConfigValue | Expression:
        if isinstance(value, dict) and set(value) == {"expr"}:
            return self._expression(value["expr"], where)
        if isinstance(value, (bool, int, float, str)):
            return value
        raise ConfigError(f"{where}: must be a number, text, true, false or {{expr: ...}}, not {value!r}")

    def _choices(self, spec: Any, where: str) -> tuple[Callable[[Names], tuple[ConfigValue, ...]], bool]:
        if isinstance(spec, list):
            items = [self._value(item, f"{where}[{i}]") for i, item in enumerate(spec)]
            if not items:
                raise ConfigError(f"{where}: is empty; give at least one value")
            return lambda names: _distinct(_resolved(item, names) for item in items), False
        if isinstance(spec, dict) and "range" in spec:
            return self._range(spec, where), True
        if isinstance(spec, dict) and "divisors" in spec:
            _only(spec, {"divisors", "also"}, where)
            number = self._expression(spec["divisors"], f"{where}.divisors")
            also = [self._value(v, f"{where}.also") for v in spec.get("also", [])]
            return lambda names: _distinct([*(_resolved(v, names) for v in also), *_divisors(number, names, where)]), False
        raise ConfigError(
            f"{where}: must be a list of values, {{range: [low, high], log2: true}} or {{divisors: threads}}, not {spec!r}"
        )

    def _range(self, spec: dict[str, Any], where: str) -> Callable[[Names], tuple[ConfigValue, ...]]:
        _only(spec, {"range", "log2", "step"}, where)
        bounds, log2, step = spec["range"], spec.get("log2", False), spec.get("step", 1)
        if not isinstance(bounds, list) or len(bounds) != 2:
            raise ConfigError(f"{where}.range: must be [low, high], not {bounds!r}")
        if not isinstance(log2, bool) or isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ConfigError(f"{where}: log2 must be true or false and step a whole number above 0, not {log2!r} and {step!r}")
        low, high = (self._expression(bound, f"{where}.range[{i}]") for i, bound in enumerate(bounds))
        least = 1 if log2 else 0  # sizes and counts: how far two values are apart is told by their logarithms

        def values(names: Names) -> tuple[ConfigValue, ...]:
            first, last = low.evaluate(names), high.evaluate(names)
            if first > last or first < least:
                rule = f"low must be at least {least}{' with log2' if log2 else ''} and not exceed high"
                raise ConfigError(f"{where}.range: [{first}, {last}]: {rule}; bound it with min() or max()")
            if log2:
                exponents = range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)
                found: tuple[ConfigValue, ...] = tuple(2**e for e in exponents)
            else:
                found = tuple(range(math.ceil(first), math.floor(last) + 1, step)[: _MAX_CHOICES + 1])
            if not 0 < len(found) <= _MAX_CHOICES:
                many = f"more than {_MAX_CHOICES} values; give a larger step, or log2: true" if found else "no values"
                raise ConfigError(f"{where}.range: [{first}, {last}] has {many}")
            return found

        if not low.names | high.names:
            values({})  # what is wrong for every problem is told when the file is read
        return values


def _only(spec: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in spec:
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown key; known keys: {', '.join(sorted(known))}")


def _resolved(value: ConfigValue | Expression, names: Names) -> ConfigValue:
    if isinstance(value, Expression):
        result = value.evaluate(names)
        return int(result) if isinstance(result, float) and result.is_integer() else result  # type: ignore[no-any-return]
    return value


def _divisors(number: Expression, names: Names, where: str) -> list[ConfigValue]:
    value = number.evaluate(names)
    if not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ConfigError(f"{where}.divisors: `{number.text}` is {value!r}, must be a whole number from 1 to {1 << 20}")
    return [d for d in range(1, value + 1) if value % d == 0]


def _distinct(values: Iterable[ConfigValue]) -> tuple[ConfigValue, ...]:
    found: dict[tuple[bool, ConfigValue], ConfigValue] = {}
    for value in values:
        found.setdefault((isinstance(value, bool), value), value)
    return tuple(found.values())
