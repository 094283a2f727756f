"""What of a bundle applies in this process, and what became of each entry. Knows torch's version, not Inductor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autokernel.environment import Environment
from autokernel.errors import shortened
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import Gemm, gemm_of, index_entries
from autokernel.kernels.config import KERNEL
from autokernel.ops import FUSIONS
from autokernel.ops.matching import settled
from autokernel.records import Problem, TensorSpec

log = logging.getLogger(__name__)

_KEY_IN_LOG = 120  # characters: the key of a generated kernel is its whole program


def mismatch(made: Environment, here: Environment) -> str | None:
    """One clause that says why entries made there do not hold here, None if they do.

    The device, its instruction set, the number of threads or multiprocessors and torch's minor version decide; a patch
    release, the driver and other libraries do not.
    """
    facts = (
        ("device", made.device, here.device),
        ("device name", made.device_name, here.device_name),
        ("instruction set", made.isa, here.isa),
        ("threads" if made.device == "cpu" else "multiprocessors", made.num_units, here.num_units),
        ("torch", minor(made.torch), minor(here.torch)),
    )
    for what, there, now in facts:
        if there != now:
            return f"it was tuned with {what} {there}, this is {now}"
    return None


def minor(version: str) -> str:
    """Major and minor part of a version."""
    return ".".join(version.split(".")[:2])


def region_key(problem: Problem) -> str:
    """What identifies a region during compilation, where nobody knows which inputs are constants."""
    return replace(problem, constants=(), inputs=tuple(settled(spec) for spec in problem.inputs)).key


def _sizes_key(problem: Problem) -> str:
    plain = tuple(TensorSpec.contiguous(spec.shape, spec.dtype) for spec in problem.inputs)
    return replace(problem, constants=(), inputs=plain).key


@dataclass(slots=True)
class Usage:
    """Counters of one entry: `hits` counts the sites in compiled graphs that were built from it.

    `constant_bytes` is the size of the weights that were copied for it into constants (packed, or side by side), over all
    compilations. The weights themselves stay where they are, for the model owns them.
    """

    hits: int = 0
    constant_bytes: int = 0
    reasons: list[str] = field(default_factory=list)  # why it did not apply somewhere


class Plan:
    """A bundle in use: entries by GEMM, and what happened to each. Compilations of several threads share one plan."""

    def __init__(
        self,
        bundle: Bundle,
        why_not: str | None = None,
        files: Mapping[str, Path] | None = None,
        kept: object = None,
    ) -> None:
        """What of a bundle applies.

        Args:
            bundle: the bundle.
            why_not: given, nothing of it applies here, for that reason.
            files: of its compiled kernels, by key.
            kept: what has to live as long as the plan: the folder of these files.
        """
        self.bundle = bundle
        self._kept = kept
        self.files: Mapping[str, Path] = files or {}
        self.why_not = why_not
        self._lock = threading.Lock()
        self._index: dict[Gemm, Entry] = {} if why_not else index_entries(bundle.entries)
        self._concatenated = {
            replace(gemm, ns=(sum(gemm.ns),)): entry
            for gemm, entry in self._index.items()
            if entry.config.get("merge") == "concat"
        }
        self._ranged = _by_sizes(self._index)
        self._regions: dict[str, Entry] = {}
        self._regions_of_any_layout: dict[str, Entry] = {}
        for entry in () if why_not else bundle.entries:
            if entry.problem.op in FUSIONS:
                self._regions.setdefault(region_key(entry.problem), entry)
                self._regions_of_any_layout.setdefault(_sizes_key(entry.problem), entry)
        self.usage: dict[str, Usage] = {entry.key: Usage() for entry in bundle.entries}
        if why_not:
            self.skip_all(why_not)

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        """Itself: configurations are copied with the passes that carry the plan, but its counters are one set."""
        return self

    @property
    def digest(self) -> str:
        """Changes whenever compiled code could: part of Inductor's cache key."""
        return f"{self.bundle.applied_digest}{'-stock' if self.why_not else ''}"

    @property
    def active(self) -> bool:
        return self.why_not is None and not self.bundle.stock

    @property
    def num_hit_entries(self) -> int:
        return sum(usage.hits > 0 for usage in self.usage.values())

    def find(self, gemm: Gemm) -> Entry | None:
        """The entry for a GEMM, None if stock code serves it."""
        return self._index.get(gemm)

    def find_or_merged(self, gemm: Gemm) -> Entry | None:
        """The entry for a GEMM that may itself be the concatenation of several."""
        return self._index.get(gemm) or self._concatenated.get(gemm)

    def find_for_rows(self, gemm: Gemm) -> Entry | None:
        """The entry for a GEMM that may be a concatenation, or one that was measured for a range of rows around it.

        One of the very shape comes first, whatever it says. Of several ranges that of the nearest tuned number of rows counts,
        of two as near that of the larger one: its tiles hold all rows.
        """
        return self.find_or_merged(gemm) or _nearest(self._ranged.get(replace(gemm, m=0), ()), gemm.m)

    def serves(self, entry: Entry, m: int) -> bool:
        """Whether products of an entry's sizes, but m rows, get that entry."""
        gemm = gemm_of(entry.problem)
        if gemm is None:
            return False
        if entry.config.get("merge") != "concat":
            return self.find_for_rows(replace(gemm, m=m)) is entry
        merged = any(found is entry for found, _ in self.groups(gemm.dtype, m, gemm.k))
        return merged and self.find_for_rows(replace(gemm, m=m, ns=(sum(gemm.ns),))) is entry

    @property
    def region_ops(self) -> frozenset[str]:
        """Fusions that have entries."""
        return frozenset(entry.problem.op for entry in self._regions.values())

    def find_region(self, problem: Problem) -> Entry | None:
        """The entry for a region, None if stock code serves it.

        One of the same sizes in other strides will do where there is none of the very same: GEMMs that were merged leave their
        results as columns of a wider matrix, which the profile has not seen.
        """
        return self._regions.get(region_key(problem)) or self._regions_of_any_layout.get(_sizes_key(problem))

    def groups(self, dtype: str, m: int, k: int) -> list[tuple[Entry, Gemm]]:
        """Entries that merge GEMMs of this input, with what they merge; most GEMMs first.

        Behind them those that were measured for a range of rows, where none of the GEMMs has an entry for its very shape.
        """
        merged = [
            (entry, gemm)
            for gemm, entry in self._index.items()
            if entry.problem.op == "merged_mm" and (gemm.dtype, gemm.k) == (dtype, k)
        ]
        exact = [(entry, gemm) for entry, gemm in merged if gemm.m == m]
        ranged = [(entry, replace(gemm, m=m)) for entry, gemm in merged if gemm.m != m and self._merges_at(entry, gemm, m)]
        return [*sorted(exact, key=_most_first), *sorted(ranged, key=_most_first)]

    def _merges_at(self, entry: Entry, gemm: Gemm, m: int) -> bool:
        """Whether an entry that merges GEMMs is for them at m rows, too, and nothing is for any of them at just these."""
        here = replace(gemm, m=m)
        apart = (replace(here, ns=(n,)) in self._index for n in gemm.ns)
        return self.find_for_rows(replace(here, ns=(sum(gemm.ns),))) is entry and not any(apart)

    def sizes_of_results(self, which: Callable[[Entry], bool]) -> set[tuple[str, int]]:
        """(dtype, number of elements) of what the products of such entries give."""
        held = ((gemm, entry.rows or (gemm.m, gemm.m)) for gemm, entry in self._index.items() if which(entry))
        return {(gemm.dtype, m * n) for gemm, (first, last) in held for m in range(first, last + 1) for n in gemm.ns}

    def hit(self, entry: Entry) -> None:
        with self._lock:
            self.usage[entry.key].hits += 1

    def copied(self, entry: Entry, num_bytes: int) -> None:
        """A compilation made constants of this entry's weights."""
        with self._lock:
            self.usage[entry.key].constant_bytes += num_bytes

    def counted(self) -> dict[str, tuple[int, int]]:
        """Hits and bytes of constants so far, by problem key."""
        with self._lock:
            return {key: (usage.hits, usage.constant_bytes) for key, usage in self.usage.items()}

    def uncount(self, before: Mapping[str, tuple[int, int]]) -> None:
        """A compilation failed, and what it hit is in no graph: back to what was counted before it."""
        with self._lock:
            for key, (hits, constant_bytes) in before.items():
                self.usage[key].hits, self.usage[key].constant_bytes = hits, constant_bytes

    def missed(self, entry: Entry, before: Mapping[str, tuple[int, int]], reason: str) -> None:
        """`skip`, if nothing was built from the entry since `before`, and nothing said why."""
        usage = self.usage[entry.key]
        if usage.hits == before[entry.key][0] and not usage.reasons:
            self.skip(entry, reason)

    def skip(self, entry: Entry, reason: str) -> None:
        """Stock code serves this entry's problem here; said once per entry and reason."""
        if self._noted(entry, reason):
            log.warning(
                "autokernel: stock code instead of the tuned entry for %s: %s", shortened(entry.key, _KEY_IN_LOG), reason
            )

    def skip_all(self, reason: str) -> None:
        """Stock code serves all of the bundle's problems here; said once per reason."""
        if sum(self._noted(entry, reason) for entry in self.bundle.entries) > 0:
            name, count = self.bundle.name, len(self.bundle.entries)
            log.warning("autokernel: stock code instead of bundle %s (entries: %d): %s", name, count, reason)

    def _noted(self, entry: Entry, reason: str) -> bool:
        """Whether this reason is new for this entry."""
        with self._lock:
            reasons = self.usage[entry.key].reasons
            if reason in reasons:
                return False
            reasons.append(reason)
        return True

    def report(self) -> dict[str, Usage]:
        """Usage by problem key."""
        return dict(self.usage)


def _most_first(item: tuple[Entry, Gemm]) -> int:
    return -len(item[1].ns)


def _by_sizes(index: Mapping[Gemm, Entry]) -> dict[Gemm, list[tuple[int, Entry]]]:
    """Entries of our own kernels that were measured for a range of rows, with the rows that they were tuned for.

    By the GEMM that they replace, merged ones by their concatenation, without its number of rows.
    """
    found: dict[Gemm, list[tuple[int, Entry]]] = {}
    for gemm, entry in index.items():
        if entry.rows is not None and entry.backend == "triton" and entry.config.get("kernel") == KERNEL:
            ns = (sum(gemm.ns),) if entry.config.get("merge") == "concat" else gemm.ns
            found.setdefault(replace(gemm, m=0, ns=ns), []).append((gemm.m, entry))
    return found


def _nearest(ranged: Iterable[tuple[int, Entry]], m: int) -> Entry | None:
    """Of the entries whose range holds m, that of the nearest tuned number of rows."""
    held = [(tuned, entry) for tuned, entry in ranged if entry.rows is not None and entry.rows[0] <= m <= entry.rows[1]]
    return min(held, key=lambda item: (abs(item[0] - m), -item[0]))[1] if held else None


__all__ = ["Gemm", "Plan", "Usage", "gemm_of", "minor", "mismatch"]
