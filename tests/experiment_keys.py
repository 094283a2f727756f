"""The tables of an experiment's keys in docs/reference.md, made from the schema that `autokernel schema` prints.

python tests/experiment_keys.py     # writes them into the page
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autokernel.config import Experiment

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
BEGIN, END = "<!-- keys: tests/experiment_keys.py writes them -->", "<!-- end of keys -->"

_Schema = Mapping[str, Any]
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_SCENARIOS = {"PrefillScenario": "prefill", "DecodeScenario": "decode", "CallScenario": "call"}


def keys_markdown() -> str:
    """A table per section of an experiment, and one for each kind of scenario and for tensors."""
    schema = Experiment.model_json_schema()
    sections = schema["$defs"]
    parts = ["### The top level", _table(schema, "")]
    for key, value in schema["properties"].items():
        if _section(value) in sections:
            parts += _titled(f"### `{key}`", sections[_section(value)], f"{key}.")
    parts += _titled("### `validation.eval`", sections["EvalSection"], "validation.eval.")
    for name, kind in _SCENARIOS.items():
        parts += _titled(f"### `scenarios`: kind `{kind}`", sections[name], "")
    parts += _titled("### A tensor among the inputs of a `call`", sections["TensorInput"], "")
    return "\n\n".join(parts)


def _titled(title: str, section: _Schema, prefix: str) -> list[str]:
    said = section.get("description", "").partition("\n\n")[0].replace("\n", " ")
    return [title, *([said] if said else []), _table(section, prefix)]


def _table(section: _Schema, prefix: str) -> str:
    required = section.get("required", ())
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = "required" if key in required else "" if _section(value) else _default(value.get("default"))
        said = f"see [`{key}`](#{key})" if _section(value) and not prefix else value.get("description", "")
        lines.append(f"| `{prefix}{key}` | {_kind(value)} | {default} | {_cell(said)} |")
    return "\n".join(lines)


def _section(value: _Schema) -> str:
    return str(value.get("$ref", "")).rpartition("/")[2]


def _default(value: object) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _kind(value: _Schema) -> str:
    """What a key may hold, in words."""
    if _section(value):
        return "a section" if _section(value) != "TensorInput" else "a tensor"
    for several in ("anyOf", "oneOf"):
        if several in value:
            kinds = dict.fromkeys(_kind(part) for part in value[several] if part.get("type") != "null")
            return " or ".join(kinds)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    match value.get("type"):
        case "array":
            items = value.get("items", {})
            return f"list of {_kind(items)}" if items else "list"
        case "object":
            return "mapping"
        case "integer":
            return f"whole number{_bounds(value)}"
        case "number":
            return f"number{_bounds(value)}"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "path" if value.get("format") == "path" else "text"
        case _:
            return "anything"


def _bounds(value: _Schema) -> str:
    said = [f"{sign} {value[bound]:g}" for bound, sign in _BOUNDS.items() if bound in value]
    return f" {' and '.join(said)}" if said else ""


def with_keys(page: str) -> str:
    """The page with the tables of today between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{keys_markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_keys(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
