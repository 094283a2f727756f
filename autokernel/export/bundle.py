"""The bundle: what a run found, as one versioned JSON document that people can read and production can load.

A bundle is a folder with `bundle.json` (and `objects/`, where it has compiled kernels), or a `.zip` of it. Needs neither torch
nor any part of the search stack.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from autokernel.cutedsl.spec import ObjectInfo
from autokernel.environment import Environment
from autokernel.errors import BundleError
from autokernel.records import ConfigValue, Problem, Record, Speedup, digest_of

_FILE_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
FORMAT = "autokernel-bundle"
FORMAT_VERSION = 3
DOCUMENT = "bundle.json"
OBJECTS = "objects"  # folder of compiled kernels, each with its record beside it
RANGE = ("m_min", "m_max")  # in the config of an entry that holds for more rows than its problem has
OWN_OPTIONS = ("freezing", "blas_library", "one_row", "pdl")  # graph options that are autokernel's own, not Inductor's


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Record):
    """One kernel choice: for this problem, build that config. Times are microseconds of one call."""

    problem: Problem
    backend: str
    config: Mapping[str, ConfigValue]
    scenario: str = ""
    baseline: str = ""  # label of the strongest stock choice it was confirmed against
    baseline_us: float = 0.0
    winner_us: float = 0.0
    speedup: Speedup | None = None
    regime: str = ""
    deterministic: bool = True

    def __post_init__(self) -> None:
        said = [self.config.get(name) for name in RANGE]
        if said == [None, None]:
            return
        if not all(type(value) is int for value in said) or not 1 <= said[0] <= said[1]:  # type: ignore[operator]
            raise ValueError(f"config: m_min and m_max are whole numbers, 1 <= m_min <= m_max, not {said[0]!r} and {said[1]!r}")

    @property
    def key(self) -> str:
        return self.problem.key

    @property
    def rows(self) -> tuple[int, int] | None:
        """(first, last) of the numbers of rows that it was measured for; None: for those of its problem alone."""
        first, last = (self.config.get(name) for name in RANGE)
        return None if first is None or last is None else (int(first), int(last))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioOptions(Record):
    """Graph options that help one scenario, and hurt another: for graphs with exactly the products that were measured.

    `products` are those by a weight, as "dtype MxNxK", each once, sorted.
    """

    scenario: str
    products: tuple[str, ...]
    options: Mapping[str, ConfigValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Record):
    """Everything production needs to build the tuned model, and everything people need to trust it.

    `results` holds the model-level evidence (scenario times, eval metric, verdict) and `provenance` the experiment's
    text, seed, run and commit; neither changes what is built. `applied_digest` covers what does.
    """

    name: str
    created: str  # ISO 8601, UTC
    version: str  # autokernel's
    environment: Environment
    entries: tuple[Entry, ...] = ()
    graph_options: Mapping[str, ConfigValue] = field(default_factory=dict)
    scenario_options: tuple[ScenarioOptions, ...] = ()
    objects: tuple[ObjectInfo, ...] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    digest: str = ""

    @property
    def stock(self) -> bool:
        """A bundle without entries and options changes nothing."""
        return not self.entries and not self.has_options

    @property
    def has_options(self) -> bool:
        """Whether it sets options for any graph."""
        return bool(self.graph_options or self.scenario_options)

    def options_of(self, products: Sequence[str]) -> dict[str, ConfigValue]:
        """The graph options for a graph with these products."""
        fitting = (part.options for part in self.scenario_options if tuple(products) == part.products)
        return {**self.graph_options, **next(fitting, {})}

    @property
    def applied_digest(self) -> str:
        """Hash of what decides the compiled code; part of Inductor's cache key."""
        entries = [[e.key, e.backend, dict(e.config)] for e in self.entries]
        parts = [[list(part.products), dict(part.options)] for part in self.scenario_options]
        objects = [[item.key, item.sha256] for item in self.objects]
        return digest_of([entries, dict(self.graph_options), parts, objects, self.environment.to_json()])

    def sealed(self) -> Self:
        """The same bundle with its digest filled in."""
        return replace(self, digest=self._content_digest())

    def _content_digest(self) -> str:
        document = self.to_json()
        document.pop("digest")
        return digest_of(document, length=64)

    def check_digest(self, where: str) -> None:
        """Raises BundleError if the content was changed after it was sealed."""
        if self.digest != self._content_digest():
            raise BundleError(
                f"{where}: the digest does not match the content: the bundle was edited or damaged; export it again, "
                "or load it with check=False if you edited it on purpose"
            )


def write_bundle(bundle: Bundle, folder: Path, objects: Mapping[str, Path] | None = None) -> tuple[Path, Path]:
    """Write the folder and the `.zip` beside it, each file atomically. Returns both paths.

    Args:
        bundle: what to write.
        folder: where; its name with `.zip` is the archive's.
        objects: the files of the bundle's compiled kernels, by key.

    Raises:
        BundleError: it cannot be written, or a kernel is missing or not the one that the bundle speaks of.
    """
    bundle = bundle.sealed()
    text = json.dumps(bundle.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    archive = folder.with_name(folder.name + ".zip")
    try:
        files = {DOCUMENT: text.encode(), **_object_files(bundle, objects or {})}
        (folder / OBJECTS if bundle.objects else folder).mkdir(parents=True, exist_ok=True)
        for name, data in reversed(files.items()):  # the document last: what it speaks of is there before it
            _replace_file(folder / name, data)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
            for name, data in files.items():
                # a fixed date makes equal bundles equal archives
                members.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        _replace_file(archive, packed.getvalue())
        for old in (folder / OBJECTS).glob("*"):
            if f"{OBJECTS}/{old.name}" not in files:
                old.unlink()  # of an earlier export into this folder
    except OSError as error:
        cure = "free some space there, or make the folder writable, then run the same command again"
        raise BundleError(f"{folder}: the bundle cannot be written: {error}; the journal has every result: {cure}") from error
    return folder, archive


def _object_files(bundle: Bundle, objects: Mapping[str, Path]) -> dict[str, bytes]:
    """Names in the bundle and contents: each kernel, and its record.

    Raises:
        BundleError: a kernel is missing, or another than the bundle speaks of.
    """
    files: dict[str, bytes] = {}
    for info in bundle.objects:
        data = objects[info.key].read_bytes() if info.key in objects else b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise BundleError(
                f"compiled kernel {info.file_name} is not the one that was recorded: clear the cache, export again"
            )
        files[f"{OBJECTS}/{info.file_name}"] = data
        files[f"{OBJECTS}/{info.key}.json"] = (json.dumps(info.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _replace_file(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        try:
            temporary.write(data)
            temporary.flush()
            os.fsync(temporary.fileno())
            os.chmod(temporary.name, 0o644)
            os.replace(temporary.name, path)
        except OSError:
            os.unlink(temporary.name)  # half a document must not take up what is left of a full disk
            raise


def read_bundle(path: Path | str, *, check: bool = True) -> Bundle:
    """Read a bundle from its folder, its `.zip` or its `bundle.json`.

    Raises:
        BundleError: missing, damaged, or of a format this version does not read.
    """
    path = Path(path)
    document = path / DOCUMENT if path.is_dir() else path
    try:
        if zipfile.is_zipfile(document):
            with zipfile.ZipFile(document) as packed:
                text = packed.read(DOCUMENT).decode()
        else:
            text = document.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise BundleError(f"{document}: no such file; a bundle is a folder with {DOCUMENT}, or its .zip") from None
    except (OSError, KeyError, UnicodeDecodeError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{document}: not a readable bundle: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{document}: not a bundle: `format` must be "{FORMAT}"')
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{document}: format_version is {data.get('format_version')!r}, but this autokernel reads {FORMAT_VERSION}; "
            "install the autokernel that wrote it, or export the run again with this one"
        )
    try:
        bundle = Bundle.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{document}: damaged: {error}") from None
    for info in bundle.objects:
        if _FILE_STEM.fullmatch(info.key) is None:  # files are named by it
            raise BundleError(f"{document}: damaged: a compiled kernel's key is letters and digits, not {info.key!r}")
    if check:
        bundle.check_digest(str(document))
    return bundle


def read_objects(path: Path | str, bundle: Bundle, folder: Path) -> dict[str, Path]:
    """The files of a bundle's compiled kernels, by key; from an archive they are unpacked into a folder.

    Args:
        path: where the bundle lies.
        bundle: what was read from there.
        folder: for what has to be unpacked.

    Raises:
        BundleError: the archive cannot be read.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        where = (path if path.is_dir() else path.parent) / OBJECTS
        return {info.key: where / info.file_name for info in bundle.objects}
    try:
        with zipfile.ZipFile(path) as packed:
            there = set(packed.namelist())
            for info in bundle.objects:
                for name in (info.file_name, f"{info.key}.json"):
                    if f"{OBJECTS}/{name}" in there:  # whoever loads it says what is missing
                        (folder / name).write_bytes(packed.read(f"{OBJECTS}/{name}"))
    except (OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: its compiled kernels cannot be unpacked into {folder}: {error}") from None
    return {info.key: folder / info.file_name for info in bundle.objects}
