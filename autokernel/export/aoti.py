"""A bundle in a package of AOTInductor, which runs without Dynamo, and from C++ without Python.

    program = torch.export.export(model, inputs)
    package = autokernel.aoti_compile_and_package(program, "path/to/bundle", package_path="model.pt2")
    run = torch._inductor.aoti_load_package(package.path)

The bundle's kernels are compiled into the package: loading it needs torch alone, and nothing of autokernel. Whether a machine
fits is decided when the package is compiled, for code cannot fall back later: load it where the bundle was made, or on the
same kind of machine. `run.get_metadata()` says which bundle is in it, and where that was tuned.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from autokernel.export.apply import BundleBackend, OnMismatch, inductor_options, load_bundle
from autokernel.export.bundle import Bundle
from autokernel.export.dependent_launch import OPTION as PDL
from autokernel.export.freezing import needs_constant
from autokernel.export.host_compiler import shared_libstdcxx
from autokernel.export.pins import install
from autokernel.export.plan import Plan, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A compiled package: its `.pt2`, and per problem key how many sites in it were built from the entry."""

    path: str
    usage: Mapping[str, Usage] = field(default_factory=dict)


def aoti_compile_and_package(
    exported_program: torch.export.ExportedProgram,
    bundle: Bundle | Path | str,
    *,
    package_path: Path | str | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    on_mismatch: OnMismatch = "stock",
) -> Package:
    """`torch._inductor.aoti_compile_and_package` with a bundle's kernel choices.

    Args:
        exported_program: from `torch.export.export`, on the bundle's device and in the shapes that were tuned.
        bundle: the bundle, or where it lies.
        package_path: where to write the `.pt2`; default: Inductor's cache.
        inductor_configs: further options of Inductor, which take precedence over the bundle's.
        on_mismatch: as for `autokernel.backend`.

    Raises:
        BundleError: the bundle cannot be read, or does not fit and `on_mismatch` is "error".
    """
    plan = BundleBackend(load_bundle(bundle), on_mismatch).plan
    with linking_options() as linking, torch.no_grad():  # gradients would keep weights from being packed
        options = {**linking, **aoti_options(plan), **(inductor_configs or {})}
        path = torch._inductor.aoti_compile_and_package(
            exported_program,
            package_path=str(package_path) if package_path is not None else None,
            inductor_configs=options,
        )
    usage = plan.report()
    missed = [key for key, item in usage.items() if not item.hits]
    if plan.active and missed:
        log.info("autokernel: %d of %d entries have no place in this package", len(missed), len(usage))
    return Package(path=str(path), usage=usage)


@contextlib.contextmanager
def linking_options() -> Iterator[dict[str, str]]:
    """Inductor's configuration for packages that can be loaded beside torch, whichever libstdc++ the compiler finds."""
    with shared_libstdcxx(get_cpp_compiler()) as compiler:
        yield {} if compiler is None else {"cpp.cxx": compiler}


def aoti_options(plan: Plan) -> dict[str, Any]:
    """Inductor's configuration for a package with this plan; nothing for a plan that does not apply.

    Weights are constants of a package anyway. On a CPU they are packed when it is compiled; on a GPU weights that lie side by
    side are put together when it is loaded, so that they can still be exchanged (Inductor's own freezing would also merge
    products that have no entry, or an entry each).
    """
    if not plan.active:
        return {}
    install()
    environment = plan.bundle.environment
    constant = any(needs_constant(entry) for entry in plan.bundle.entries)
    on_cpu = environment.device == "cpu"
    chosen = plan.bundle.graph_options  # which graph this is, and so whether a scenario's own fit, is not known here
    folded = constant or chosen.get("freezing") == "all"
    options = inductor_options(plan, chosen, frozen=on_cpu and folded, merges=not on_cpu or folded)
    if constant and not on_cpu:
        options["aot_inductor.use_runtime_constant_folding"] = True
    options["aot_inductor.metadata"] = {
        "autokernel_bundle": plan.bundle.name,
        "autokernel_digest": plan.bundle.applied_digest,
        "autokernel_device": environment.device_name,
    }
    if "blas_library" in chosen:
        library = chosen["blas_library"]
        log.warning("autokernel: a package cannot choose %s: call preferred_blas_library(%r) where it runs", library, library)
    if PDL in chosen:
        log.warning("autokernel: a package launches kernels one behind the other: %s is left out", PDL)
    return options
