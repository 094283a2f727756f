"""Reading YAML: a file into keys and values, and `--set a.b=value` on top of them; every mistake is a `ConfigError`."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from autokernel.config_messages import without_passwords
from autokernel.errors import ConfigError, shortened

# What PyYAML raises, besides its own errors, for values that are not what they look like or are tagged as.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
_TAGS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "timestamp": "a date",
    "binary": "binary data (base64)",
}


def parse_yaml_mapping(text: str, path: Path) -> dict[str, Any]:
    """A YAML document that must be a mapping, with duplicate keys refused.

    Raises:
        ConfigError: names the file and, for a syntax error, line and column.
    """
    try:
        data = _load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {_problem(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold keys and values, not {type(data).__name__}")
    return data


def set_value(data: dict[str, Any], override: str) -> None:
    """Put the value of `a.b=value`, in YAML, into a document that was read.

    Sections on the way are copied: YAML makes one object of an anchor and its aliases, which other sections keep as it is.

    Raises:
        ConfigError: names the `--set`.
    """
    said = f"--set {shortened(without_passwords(override), 200)}"
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{said}: must look like search.trials=50")
    *parents, last = dotted.split(".")
    target: Any = data
    for parent in parents:
        if not isinstance(target, dict):
            raise ConfigError(f"{said}: `{parent}` lies below something that is not a section")
        below = target.get(parent, {})
        target[parent] = dict(below) if isinstance(below, dict) else below
        target = target[parent]
    if not isinstance(target, dict):
        raise ConfigError(f"{said}: `{'.'.join(parents)}` is not a section")
    try:
        target[last] = _load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{said}: the value is not valid YAML: {without_passwords(_problem(error))}") from None


def _problem(error: yaml.YAMLError) -> str:
    return str(error.problem or error.context) if isinstance(error, yaml.MarkedYAMLError) else str(error)


def _load(text: str) -> Any:
    """A document's value.

    Raises:
        yaml.YAMLError: whatever is wrong with the text.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("lists and sections are nested too deeply: write fewer in each other") from None
    except _UNREADABLE as error:
        raise yaml.YAMLError(f"{error}: write it otherwise") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, instead of silently keeping the last one, and says which value is wrong."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # hexadecimal ones may have more digits than Python writes
            elif isinstance(value, str):
                value.encode()  # halves of characters cannot be written to any file
        except _UNREADABLE as error:
            said = shortened(repr(node.value)) if isinstance(node, yaml.ScalarNode) else "this"
            what = _TAGS.get(node.tag.rpartition(":")[2], node.tag)
            cure = "write whole characters" if isinstance(error, UnicodeEncodeError) else "write it in quotes if it is text"
            problem = f"{said} cannot be read as {what}: {cure}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<` brings defaults, which may be given again
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
