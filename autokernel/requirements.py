"""Installed distributions against the version ranges that autokernel declares."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

# Modules whose distribution has another name, or comes with an extra: module -> distribution, extra.
_EXTRAS = {
    "chronos": ("chronos-forecasting", "models"),
    "diffusers": ("diffusers", "models"),
    "psycopg2": ("psycopg2-binary", "postgresql"),
}


def installed_version(name: str) -> str | None:
    """Version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_extra(extra: str) -> str:
    """The command that installs an extra. Not by autokernel's name: on PyPI that is another project's."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def cure_of(error: ImportError) -> str:
    """What to install for a module that is missing, as `; chronos-forecasting has it: ...`; empty where nobody can tell."""
    distribution, extra = _EXTRAS.get((error.name or "").partition(".")[0], ("", ""))
    return f"; {distribution} has it: {install_extra(extra)} in autokernel's checkout" if distribution else ""


def declared_ranges() -> dict[str, str]:
    """Distribution -> version range, of every dependency and extra: from the installed package, or the checkout's own file."""
    requirements = []
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        requirements = [
            *table.get("dependencies", ()),
            *(r for e in table.get("optional-dependencies", {}).values() for r in e),
        ]
    else:
        try:
            requirements = importlib.metadata.requires("autokernel") or []
        except importlib.metadata.PackageNotFoundError:
            return {}
    ranges: dict[str, str] = {}
    for requirement in requirements:
        parsed = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
        if parsed:
            name = re.sub(r"[-_.]+", "-", parsed.group(1)).lower()
            ranges.setdefault(name, parsed.group(2).replace(" ", ""))
    return ranges


def out_of_range(version: str, wanted: str) -> str | None:
    """ "too old" or "too new" for a range like `>=2.11,<2.16`; None if it is inside."""
    have = _numbers(version)
    for clause in filter(None, wanted.split(",")):
        parsed = re.fullmatch(r"(>=|<=|==|<|>|!=|~=)([0-9][0-9.]*).*", clause)
        if parsed is None:
            continue
        operator, limit = parsed.group(1), _numbers(parsed.group(2))
        if operator in (">=", ">", "~=", "==") and have < limit:
            return "too old"
        if (operator == "<" and have >= limit) or (operator in ("<=", "==") and have[: len(limit)] > limit):
            return "too new"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()
