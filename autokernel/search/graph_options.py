"""Which sets of graph-level options may be tried; read from `search_spaces/graph.yaml`. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from autokernel.config import parse_yaml_mapping
from autokernel.errors import ConfigError
from autokernel.records import ConfigValue
from autokernel.requirements import out_of_range
from autokernel.search.space_file import default_spaces_folder

Options = dict[str, ConfigValue]

FILE = "graph.yaml"
VERSIONS = "torch"  # in a set: for which versions of torch it is
_RANGE = re.compile(r"(>=|<=|==|<)[0-9][0-9.]*(,(>=|<=|==|<)[0-9][0-9.]*)*")


def load_graph_options(device: str, folder: Path | None = None, torch: str | None = None) -> list[Options]:
    """Option sets for a device, in the order in which they are worth trying.

    Args:
        device: "cpu" or "cuda".
        folder: of `search_spaces/`; the package's own where it has no such file.
        torch: the version that they are for; sets for others are left out. None: all.

    Raises:
        ConfigError: the file is missing or says something else than sets of options.
    """
    path = (folder or default_spaces_folder()) / FILE
    if folder is not None and not path.exists():
        path = default_spaces_folder() / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    sections = parse_yaml_mapping(text, path)
    unknown = set(sections) - {"cpu", "cuda"}
    if unknown:
        raise ConfigError(f"{path}: {sorted(unknown)[0]}: unknown section; there are cpu and cuda")
    sets = sections.get(device) or []
    for number, options in enumerate(sets):
        if not isinstance(options, dict) or not options:
            raise ConfigError(f"{path}: {device}.{number}: must be a set of options (name: value), not {options!r}")
        for name, value in options.items():
            if not isinstance(value, (bool, int, float, str)):
                raise ConfigError(f"{path}: {device}.{number}.{name}: {value!r} must be a number, a boolean or a string")
        wanted = options.get(VERSIONS)
        if wanted is not None and not (isinstance(wanted, str) and _RANGE.fullmatch(wanted)):
            raise ConfigError(f'{path}: {device}.{number}.{VERSIONS}: must be a range like ">=2.13,<2.15", not {wanted!r}')
        if set(options) == {VERSIONS}:
            raise ConfigError(f"{path}: {device}.{number}: must have an option beside the versions that it is for")
    fitting = [options for options in sets if torch is None or out_of_range(torch, str(options.get(VERSIONS, ""))) is None]
    return [{name: value for name, value in options.items() if name != VERSIONS} for options in fitting]


def merged(sets: list[Options]) -> Options:
    """The union of option sets; where two disagree, the first one counts."""
    union: Options = {}
    for options in sets:
        for name, value in options.items():
            union.setdefault(name, value)
    return union


def spelled(options: Options) -> str:
    """`a=1, b=true`; "none" for no options."""
    return ", ".join(f"{k}={v}" for k, v in sorted(options.items())) or "none"
