"""Production: make `torch.compile` use a bundle. Needs torch alone.

    model = torch.compile(model, backend=autokernel.backend("path/to/bundle"))

Nothing is benchmarked. What the bundle does not cover, or what does not hold on this machine, gets Inductor's stock code,
and one log line says why.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from autokernel.environment import current_environment
from autokernel.errors import BundleError, shortened
from autokernel.export.blas import with_blas_library
from autokernel.export.bundle import OWN_OPTIONS, Bundle, read_bundle, read_objects
from autokernel.export.chain import PassChain
from autokernel.export.cutedsl import CutePass, is_cute
from autokernel.export.dependent_launch import OPTION as PDL
from autokernel.export.dependent_launch import dependent_launches
from autokernel.export.freezing import (
    Frozen,
    FrozenGraph,
    freeze_inputs,
    needs_constant,
    sizes_change,
    weights_to_freeze,
)
from autokernel.export.isa_probes import built_ahead
from autokernel.export.matching import Gemm
from autokernel.export.missed import MissedPass
from autokernel.export.one_row import ALL, OPTION, OneRowPass, ReductionPass, is_reduction
from autokernel.export.passes import MergePass, SitePass
from autokernel.export.pins import install
from autokernel.export.plan import Plan, Usage, mismatch
from autokernel.export.products import Product, graph_products, held_parameters, may_hold, names_of, take_in
from autokernel.export.regions import RegionPass
from autokernel.export.substitution import SubstitutionPass, is_substituted
from autokernel.export.templates import TemplatePass, has_template
from autokernel.records import ConfigValue

log = logging.getLogger(__name__)

_ERROR_IN_LOG = 300  # characters

OnMismatch = Literal["stock", "apply", "error"]


class BundleBackend:
    """A `torch.compile` backend: Inductor, with a bundle's kernel choices. Safe to use from several threads."""

    def __init__(
        self, bundle: Bundle, on_mismatch: OnMismatch = "stock", where: Path | str | None = None, *, fall_back: bool = False
    ) -> None:
        """See `backend`.

        Args:
            bundle: the bundle.
            on_mismatch: as for `backend`.
            where: where it lies, for its compiled kernels; without it they come from this machine's cache.
            fall_back: compile a graph without the bundle if it cannot be compiled with it, instead of raising.
        """
        if on_mismatch not in get_args(OnMismatch):
            known = ", ".join(map(repr, get_args(OnMismatch)))
            raise BundleError(f"on_mismatch is one of {known}, not {on_mismatch!r}")
        here = current_environment(bundle.environment.device) if _device_there(bundle.environment.device) else None
        why_not = f"there is no {bundle.environment.device} device" if here is None else mismatch(bundle.environment, here)
        if why_not and on_mismatch == "error":
            raise BundleError(f"bundle {bundle.name}: {why_not}; tune again on this machine, or allow stock code")
        if why_not and on_mismatch == "apply":
            log.warning("autokernel: bundle %s is applied although %s", bundle.name, why_not)
            why_not = None
        # from an archive they are unpacked, for as long as the plan lives
        needed = bundle.objects and where and why_not is None
        unpacked = tempfile.TemporaryDirectory(prefix="autokernel-objects-") if needed else None
        files = read_objects(where, bundle, Path(unpacked.name)) if unpacked and where else {}
        self.plan = Plan(bundle, why_not, files, unpacked)
        self.graphs: list[tuple[str, ...]] = []  # the products of each graph that was compiled
        self.gemms: set[Gemm] = set()  # of all of them
        self._lenient = on_mismatch == "apply"
        self._fall_back = fall_back
        self._made_of = (bundle, on_mismatch, where, fall_back)
        self._frozen: weakref.WeakSet[FrozenGraph] = weakref.WeakSet()

    @property
    def bundle(self) -> Bundle:
        return self.plan.bundle

    def __deepcopy__(self, memo: dict[int, Any]) -> BundleBackend:
        """Itself: a model is copied with what it was compiled by, whose counters and kernels are this process's."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Elsewhere it is made anew: what holds is checked there, and counters begin at zero."""
        return _made, self._made_of

    def usage(self) -> dict[str, Usage]:
        """Per problem key: how many sites were built from the entry so far, and why others were not."""
        return self.plan.report()

    def refresh(self) -> None:
        """Pack the weights anew at the next call of each compiled graph.

        Weights that were exchanged, or changed in place, are seen without it. It is for what nobody can see: writing through
        `.data`, as in `weight.data += delta`, which is how adapters are often merged.
        """
        for graph in list(self._frozen):
            graph.forget()

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        if given:
            named = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise BundleError(
                f"torch.compile(backend=autokernel.backend(...)) takes no {named}: graph options belong in the bundle, "
                "and CUDA graphs are captured by hand"
            )
        held = held_parameters(gm)
        values = [*inputs, *(getattr(gm, name) for name in held)]
        products = graph_products(gm, values)
        names = names_of(products)
        self.graphs.append(names)
        self.gemms.update(product.gemm for product in products)
        unfit = self._unfit(inputs) if self.plan.active else None
        if unfit is not None:
            self.plan.skip_all(unfit)
        if unfit is not None or not self.plan.active:
            return _inductor(gm, inputs, {}, {})
        chosen = self.plan.bundle.options_of(names)
        with built_ahead() if self.plan.bundle.environment.device == "cpu" else contextlib.nullcontext():
            compiled = self._attempt(lambda: self._compile(gm, values, held, products, chosen))
        if compiled is None:
            return _inductor(gm, inputs, {}, {})
        library = chosen.get("blas_library")
        return compiled if library is None else with_blas_library(compiled, str(library))

    def _attempt(self, compile_with: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """A compilation with the bundle; None if it failed, and is to be done without."""
        before = self.plan.counted()
        try:
            return compile_with()
        except BundleError:
            raise
        except Exception as error:  # a kernel, a compiler of this machine or the model itself is at fault
            if not self._fall_back:
                raise
            self.plan.uncount(before)
            said = shortened(" ".join(str(error).split()) or "no message", _ERROR_IN_LOG)
            self.plan.skip_all(f"a graph could not be compiled with it: {type(error).__name__}: {said}")
            log.info("autokernel: why", exc_info=True)
            return None

    def _compile(
        self,
        gm: torch.fx.GraphModule,
        values: Sequence[Any],
        held: Sequence[str],
        products: Sequence[Product],
        chosen: Mapping[str, ConfigValue],
    ) -> Callable[..., Any]:
        """A graph with the bundle; `values` are its inputs, and behind them its parameters of the names `held`."""
        plan = self.plan
        install()
        inputs = values[: len(values) - len(held)]
        frozen = weights_to_freeze(products, values, plan, everything=chosen.get("freezing") == "all")
        changing = bool(frozen.positions) and sizes_change(gm, inputs)
        if changing:
            for entry, _ in frozen.copied:
                plan.skip(
                    entry, "its weights are constants of graphs of fixed sizes, and this one is for several: dynamic=False"
                )
        if changing or not frozen.positions:
            options = inductor_options(plan, chosen, frozen=False, explain=not changing)
            if may_hold(gm, plan.sizes_of_results(needs_constant)):
                options["fx_graph_cache"] = False  # of a graph from the cache nobody says why an entry is not in it
            return _inductor(gm, inputs, options, chosen)
        return self._freeze(gm, values, held, frozen, chosen)

    def _freeze(
        self,
        gm: torch.fx.GraphModule,
        values: Sequence[Any],
        held: Sequence[str],
        frozen: Frozen,
        chosen: Mapping[str, ConfigValue],
    ) -> Callable[..., Any]:
        plan, num_inputs = self.plan, len(values) - len(held)
        # what torch's own freezing keeps within the graph is looked at at each call as well, where an entry needs it
        taken = [name for i, name in enumerate(held, start=num_inputs) if i in frozen.positions]
        whole = take_in(gm, taken)
        order = [*range(num_inputs), *(i for i in frozen.positions if i >= num_inputs)]
        positions = [order.index(i) for i in frozen.positions]

        # given what a call has: nothing of the first one is kept
        def compile_frozen(args: Sequence[Any]) -> Callable[..., Any]:
            before = plan.counted()
            for entry, num_bytes in frozen.copied:
                plan.copied(entry, num_bytes)
            module = freeze_inputs(whole, args, positions)
            rest = [value for i, value in enumerate(args) if i not in set(positions)]
            compiled = _inductor(module, rest, inductor_options(plan, chosen, frozen=True), chosen)
            for entry, _ in frozen.copied:
                plan.missed(entry, before, "its weights are constants, and Inductor built no product from it")
            return compiled

        def compile_stock(args: Sequence[Any]) -> Callable[..., Any]:
            return _inductor(whole, args, inductor_options(plan, chosen, frozen=False, explain=False), chosen)

        def compile_plain(args: Sequence[Any]) -> Callable[..., Any]:
            return _inductor(whole, args, {}, {})

        graph = FrozenGraph(
            compile_frozen,
            compile_stock,
            compile_plain,
            self._attempt,
            positions,
            num_inputs=len(order),
            inputs=[values[i] for i in order],
        )
        self._frozen.add(graph)
        return graph if not taken else lambda *args: graph(*args, *(getattr(gm, name) for name in taken))

    def _unfit(self, inputs: Sequence[Any]) -> str | None:
        """Why nothing of the bundle is for a graph of these inputs, as things are when it is compiled."""
        made = self.bundle.environment
        devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
        kinds = sorted({device.type for device in devices})
        if kinds and made.device not in kinds:
            return f"it was tuned for {made.device}, and this graph is on {' and '.join(kinds)}"
        if not self._lenient and (other := self._other_machine(devices)) is not None:
            return other
        if torch.is_grad_enabled():
            return "gradients are enabled; compile and call under torch.inference_mode() or torch.no_grad()"
        return None

    def _other_machine(self, devices: Collection[torch.device]) -> str | None:
        """What of these devices, or of the threads, is otherwise than where the bundle was made."""
        made = self.bundle.environment
        if made.device == "cpu" and (threads := torch.get_num_threads()) != made.num_units:
            return f"it was tuned with threads {made.num_units}, this is {threads}"
        if made.device == "cuda" and torch.cuda.is_available():
            names = {torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"}
            if others := sorted(names - {made.device_name}):
                return f"it was tuned on {made.device_name}, and this graph is on {' and '.join(others)}"
        return None


def _made(bundle: Bundle, on_mismatch: OnMismatch, where: Path | str | None, fall_back: bool) -> BundleBackend:
    return BundleBackend(bundle, on_mismatch, where, fall_back=fall_back)


def _inductor(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], chosen: Mapping[str, ConfigValue]
) -> Callable[..., Any]:
    with dependent_launches(chosen[PDL], inputs) if chosen.get(PDL) else contextlib.nullcontext():
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def _device_there(device: str) -> bool:
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def inductor_options(
    plan: Plan, chosen: Mapping[str, ConfigValue], *, frozen: bool, merges: bool | None = None, explain: bool = True
) -> dict[str, Any]:
    """Inductor's configuration for a compilation with this plan and these graph options.

    Args:
        plan: the entries.
        chosen: the graph options.
        frozen: whether weights are constants, and folded.
        merges: whether weights may be put side by side; default: where they are folded. Else each call would do it again.
        explain: say why products with an entry that needs constant weights get stock code; not where that was said already.

    The lookup table carries the plan's digest: its contents are part of the cache key of compiled graphs in every
    version of torch, which our hooks are not.
    """
    options: dict[str, Any] = {
        "post_grad_custom_pre_pass": PassChain(plan, [SitePass(plan), *([MissedPass(plan)] if explain else [])]),
        "lookup_table.table": {"autokernel": [{"digest": plan.digest}]},
    }
    on_cpu = plan.bundle.environment.device == "cpu"
    if frozen if merges is None else merges:
        options["joint_custom_post_pass"] = MergePass(plan, min_rows=2 if not on_cpu and chosen.get(OPTION) == ALL else 1)
    if on_cpu:
        options["max_autotune_gemm"] = True  # offers templates; the pins leave one choice, so nothing is timed
        options["max_autotune_gemm_backends"] = "ATEN,CPP"
        if plan.region_ops:
            options["post_grad_custom_post_pass"] = PassChain(plan, [RegionPass(plan)])
    else:
        # Inductor times GEMMs of uneven sizes with and without padding in every new process, and may find another answer than
        # when this model was profiled: entries are for the model's own sizes, and nothing is timed
        options["shape_padding"] = False
        # Inductor's default for every GEMM but those with an entry
        passes: list[CustomGraphPass] = [
            RegionPass(plan), TemplatePass(plan), SubstitutionPass(plan), CutePass(plan), ReductionPass(plan),
        ]  # fmt: skip
        if OPTION in chosen or any(map(is_reduction, plan.bundle.entries)):
            # else Inductor would time a second block size of such a reduction in every new process
            options["dynamic_scale_rblock"] = False
        if OPTION in chosen:
            passes.insert(0 if chosen[OPTION] == ALL else len(passes), OneRowPass(plan, chosen[OPTION]))
        options["post_grad_custom_post_pass"] = PassChain(plan, passes)
    if any(has_template(entry) for entry in plan.bundle.entries):
        # what runs in front of a product was part of no measurement, and inside a template it runs once per column of tiles
        options["prologue_fusion"] = False
    if plan.region_ops or any(
        (entry.config.get("template") or is_substituted(entry) or is_cute(entry)) and not (on_cpu and needs_constant(entry))
        for entry in plan.bundle.entries
    ):
        # what comes from the cache is the right code, but nobody could count that the entry is in it (graphs with weights that
        # oneDNN packed are never cached; those with merged ones on a GPU are)
        options["fx_graph_cache"] = False
    if frozen:
        options["freezing"] = True
        options["cpp.weight_prepack"] = True
    for name, value in chosen.items():
        if name not in OWN_OPTIONS:
            options[name] = value
    return options


def load_bundle(bundle: Bundle | Path | str) -> Bundle:
    """A bundle as such, or read from its folder, `.zip` or `bundle.json`."""
    return bundle if isinstance(bundle, Bundle) else read_bundle(bundle)


def _backend_of(bundle: Bundle | Path | str, on_mismatch: OnMismatch) -> BundleBackend:
    where = None if isinstance(bundle, Bundle) else bundle
    return BundleBackend(load_bundle(bundle), on_mismatch, where, fall_back=True)


def backend(bundle: Bundle | Path | str, *, on_mismatch: OnMismatch = "stock") -> BundleBackend:
    """A backend for `torch.compile`.

    A graph that cannot be compiled with the bundle, as where a kernel does not compile on this machine, is compiled without
    it: a log line says why, and `usage()` has the reason.

    Args:
        bundle: the bundle, or where it lies.
        on_mismatch: what to do if it was made for another machine or version: "stock" code (the default), "apply" it all the
            same, or an "error".

    Raises:
        BundleError: the bundle cannot be read, or does not fit and `on_mismatch` is "error".
    """
    return _backend_of(bundle, on_mismatch)


def options(bundle: Bundle | Path | str, *, on_mismatch: OnMismatch = "stock") -> Mapping[str, Any]:
    """The same as options for `torch.compile(model, options=...)`, for those who must keep `backend="inductor"`.

    Packed weights need one more line there, before the model is compiled, since Dynamo decides while it traces:
    `torch._dynamo.config.prepare_freezing = True`. It makes every parameter a constant that is never looked at again.
    `blas_library` among a bundle's graph options is for calls, not for compilation: here it must be set by hand. Options for
    the graphs of one scenario stay out, for nobody sees here which graph is compiled.
    """
    plan = _backend_of(bundle, on_mismatch).plan
    if not plan.active:
        return {}
    if "blas_library" in plan.bundle.graph_options:
        library = plan.bundle.graph_options["blas_library"]
        log.warning("autokernel: options() cannot choose %s: torch.backends.cuda.preferred_blas_library(%r)", library, library)
    if PDL in plan.bundle.graph_options:
        log.warning("autokernel: options() cannot launch kernels while others run (%s): use backend() for that", PDL)
    install()
    for part in plan.bundle.scenario_options:
        log.warning("autokernel: options() leaves out what helps %s alone: %s", part.scenario, dict(part.options))
    frozen = torch._dynamo.config.prepare_freezing or torch._inductor.config.freezing
    for entry in () if frozen else filter(needs_constant, plan.bundle.entries):
        plan.skip(entry, "options() has constant weights only with torch._dynamo.config.prepare_freezing, and backend() always")
    return inductor_options(plan, plan.bundle.graph_options, frozen=frozen, explain=frozen)


def stock_backend(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """What `torch.compile(backend="autokernel")` finds by name: it cannot know which bundle is meant.

    Raises:
        BundleError: always, with the line to write instead.
    """
    raise BundleError('name the bundle: torch.compile(model, backend=autokernel.backend("path/to/bundle"))')
