"""What is wrong with an experiment or a search space, in people's words: `key: what is wrong (value); cure`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from autokernel.errors import shortened
from autokernel.model_config import (
    FUNCTION,
    NOT_JSON,
    TENSOR,
    CallScenario,
    DecodeScenario,
    PrefillScenario,
    TensorInput,
)

NAME_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$"
ADDRESS_PATTERN = r"^(local|auto|inline|(ray://)?[^/\s]+:\d+)$"
_PATTERNS = {
    NAME_PATTERN: "letters, digits, . _ - only, a letter or a digit first",
    ADDRESS_PATTERN: "is none of local, inline, auto, HOST:PORT, ray://HOST:PORT",
}
_SCENARIOS: Mapping[str, type[BaseModel]] = {"prefill": PrefillScenario, "decode": DecodeScenario, "call": CallScenario}
_KINDS: Mapping[str, type[BaseModel]] = {**_SCENARIOS, TENSOR: TensorInput}
# What a value must be, by the beginning of pydantic's type of error.
_MUST_BE = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string_type": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
}
_BOUNDS = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"}
_SECTIONS = ("model_type", "model_attributes_type", "dict_type")
# What people mean by what is spelled otherwise.
_ALIASES = {"gpu": "cuda", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


class Mistake(NamedTuple):
    """One thing that is wrong."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def mistakes(error: ValidationError, model: type[BaseModel], data: Mapping[Any, Any]) -> list[Mistake]:
    """What pydantic found, a line per key; `data` is what it was given."""
    found: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(".".join(_keys(item, data)), []).append(item)
    return [_mistake(key, text) for key, items in found.items() for text in _texts(key, items, model)]


def _mistake(key: str, text: str) -> Mistake:
    if not key:  # of a check on the whole file, which begins with the key that is to be changed
        key, _, text = text.partition(": ")
    return Mistake(key, text)


def suggestion(word: object, known: Iterable[str], quote: str = "") -> str:
    """`; did you mean trials?` if something known is spelled much like it, else nothing."""
    known = list(known)
    alias = _ALIASES.get(str(word).lower())
    near = [alias] if alias in known else difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""


def from_overrides(key: str, overrides: Sequence[str]) -> str:
    """` (from --set search.trials=5)`: the overrides of a key, of a part of it, or of what it is a part of; may be empty."""
    said = [f"--set {without_passwords(o)}" for o in overrides if _overlap(o.partition("=")[0], key)]
    return f" (from {', '.join(said)})" if said else ""


def without_passwords(text: str) -> str:
    """A text with those of URLs hidden."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.") or not other


def _keys(item: ErrorDetails, data: Any) -> list[str]:
    """The keys down to what is wrong: pydantic's location without the kinds of unions, which no file names."""
    location = list(item["loc"])
    if location[:1] == ["scenarios"] and len(location) > 2:
        del location[2]  # scenarios, name, kind, key
    keys: list[str] = []
    for place, part in enumerate(location):
        is_there = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        )
        if is_there:
            data = data[part]
        elif item["type"] != "missing" or place < len(location) - 1:
            continue
        keys.append(str(part))
    if item["type"] == "union_tag_invalid":
        keys.append(_discriminator(item))
    if item["type"] == NOT_JSON:
        keys += item["ctx"]["keys"]
    return keys


def _texts(key: str, items: list[ErrorDetails], model: type[BaseModel]) -> list[str]:
    """What is wrong at a key; kinds of a union that all refuse the value are one sentence."""
    wanted = [words for item in items if (words := _wanted(item))]
    if len(items) > 1 and len(wanted) == len(items):
        return [_must_be(items[0]["input"], " or ".join(dict.fromkeys(wanted)))]
    return list(dict.fromkeys(_text(key, item, model) for item in items))


def _text(key: str, item: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    words = _wanted(item)
    if item["loc"][-1:] == ("[key]",) or kind == "invalid_key":
        return f"a key must be text: write {str(value)!r} in quotes"
    if kind in _SECTIONS:
        return f"is a section: write keys below it{'' if value is None else f' (got {_short(value)})'}"
    if words:
        return _must_be(value, words)
    match kind:
        case "missing":
            return f"is missing{_meaning(model, item['loc'])}"
        case "extra_forbidden":
            known = sorted(_model_at(model, item["loc"][:-1]).model_fields)
            return f"unknown key{suggestion(item['loc'][-1], known, '`') or '; known keys: ' + ', '.join(known)}"
        case "union_tag_not_found":
            return f"needs {_discriminator(item)}: {_either(list(_SCENARIOS))}"
        case "union_tag_invalid":
            return _none_of(context["tag"], _quoted(context["expected_tags"]))
        case "literal_error":
            return _none_of(value, _quoted(context["expected"]))
        case "string_pattern_mismatch" if context["pattern"] in _PATTERNS:
            rule = _PATTERNS[context["pattern"]]
            return f"{value!r}{' ' if rule.startswith('is ') else ': '}{rule}"
        case "too_short":
            return "is empty; give at least one"
        case _ if kind == NOT_JSON:
            return without_passwords(context["problem"])
        case "value_error":
            return item["msg"].removeprefix("Value error, ")
    return f"{item['msg']} (got {_short(value)})"


def _wanted(item: ErrorDetails) -> str:
    """What the value must be, if that is all there is to say."""
    kind = item["type"]
    if item["loc"][-1:] == (FUNCTION,):
        return "a section of inputs by name, or a function such as file.py:function"
    if kind in _BOUNDS:
        (bound,) = item.get("ctx", {}).values()
        return f"{_BOUNDS[kind]} {bound if isinstance(bound, int) else format(bound, 'g')}"
    if kind in _SECTIONS:
        return "a section"
    return next((words for prefix, words in _MUST_BE.items() if kind.startswith(prefix)), "")


def _must_be(value: Any, what: str) -> str:
    if value is None:
        return f"has no value: write {what}"
    example = ""
    if what == "a list" and isinstance(value, (str, int, float)):
        example = f": [{value}]"
    elif what == "text" and not isinstance(value, (list, dict)):
        example = f": write '{value}' in quotes"
    return f"{_short(value)} must be {what}{example}"


def _none_of(value: Any, options: list[str]) -> str:
    if value is None:
        return f"has no value: write {_either(options)}"
    return f"{_short(value)} is none of {', '.join(options)}{suggestion(value, options)}"


def _quoted(expected: str) -> list[str]:
    """The words between quotes in pydantic's list of what it expected."""
    return re.findall(r"'([^']*)'", expected)


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _discriminator(item: ErrorDetails) -> str:
    return str(item.get("ctx", {})["discriminator"]).strip("'")


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else without_passwords(repr(value))
    return shortened(text)


def _meaning(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What a key that is missing is for."""
    info = _model_at(model, location[:-1]).model_fields.get(str(location[-1]))
    if info is None:
        return ""
    if info.description:
        return f": {info.description}"
    section = _section(info)
    return f": a section of {', '.join(sorted(section.model_fields))}" if section is not None else ""


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section at this place of the schema."""
    current = model
    for part in location:
        if str(part) in _KINDS:
            current = _KINDS[str(part)]
            continue
        info = current.model_fields.get(str(part))
        if info is not None:
            current = _section(info) or current
    return current


def _section(info: FieldInfo) -> type[BaseModel] | None:
    for option in (info.annotation, *getattr(info.annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
