"""The bundle: what a run found, as one versioned JSON document that people can read and production can load.

A bundle is a folder with `bundle.json`, or a `.zip` of it. Needs neither torch nor any part of the search stack.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from autokernel.environment import Environment
from autokernel.errors import BundleError
from autokernel.records import ConfigValue, Problem, Record, Speedup, digest_of

FORMAT = "autokernel-bundle"
FORMAT_VERSION = 2
DOCUMENT = "bundle.json"
OWN_OPTIONS = ("freezing", "blas_library", "one_row")  # graph options that are autokernel's own, not Inductor's


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

    @property
    def key(self) -> str:
        return self.problem.key


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
        return digest_of([entries, dict(self.graph_options), parts, self.environment.to_json()])

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


def write_bundle(bundle: Bundle, folder: Path) -> tuple[Path, Path]:
    """Write the folder and the `.zip` beside it, each atomically. Returns both paths."""
    bundle = bundle.sealed()
    text = json.dumps(bundle.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    archive = folder.with_name(folder.name + ".zip")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_file(folder / DOCUMENT, text.encode())
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
            # a fixed date makes equal bundles equal archives
            members.writestr(zipfile.ZipInfo(DOCUMENT, (1980, 1, 1, 0, 0, 0)), text)
        _replace_file(archive, packed.getvalue())
    except OSError as error:
        cure = "free some space there, or make the folder writable, then run the same command again"
        raise BundleError(f"{folder}: the bundle cannot be written: {error}; the journal has every result: {cure}") from error
    return folder, archive


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
    if check:
        bundle.check_digest(str(document))
    return bundle
