"""CuTe DSL kernels in place of GEMMs: where their objects are, and the graph pass.

`CutePass` runs where Inductor's graph is final. A GEMM with an entry of backend "cutedsl", and what follows it where the entry
fuses that, becomes one call of `torch.ops.autokernel.cute_gemm` with the file of a compiled kernel. Where no object is to be
had, or the matrices are not laid out as it needs, stock code stays and the plan is told why.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V

from autokernel.cutedsl import op
from autokernel.cutedsl.config import ALIGNMENT_BYTES, CuteConfig
from autokernel.cutedsl.objects import ObjectError, load, read_info
from autokernel.cutedsl.spec import BIAS, KernelSpec, ObjectInfo
from autokernel.errors import CompileError, StorageError
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.cute_specs import (
    ADD,
    SCALES,
    arch_of,
    expected_epilogue,
    has_aligned_rows,
    spec_for,
    spec_of_value,
    specs_of,
)
from autokernel.export.pins import dtype_name
from autokernel.export.plan import Plan
from autokernel.export.templates import gemm_of_node
from autokernel.ops.epilogue import (
    BINARY_EPILOGUES,
    GATED_EPILOGUES,
    PER_COLUMN,
    Epilogue,
    find_epilogue,
    find_gated,
    operand_kind,
)
from autokernel.ops.scaled_mm import ScaledCall
from autokernel.records import digest_of

log = logging.getLogger(__name__)
aten = torch.ops.aten
prims = torch.ops.prims

BACKEND = "cutedsl"
NO_PACKAGE = "a package runs without Python, which CuTe DSL kernels are called from"

Resolver = Callable[[KernelSpec], Path]  # raises ObjectError, CompileError


def is_cute(entry: Entry) -> bool:
    """Whether the entry is a CuTe DSL kernel."""
    return entry.backend == BACKEND


def refuse_in_package() -> None:
    """Raises ValueError where a package is being compiled."""
    if V.aot_compilation:
        raise ValueError(NO_PACKAGE)


def objects_of(plan: Plan) -> Resolver:
    """Finds the objects of kernels: among those of the plan's bundle, else in this machine's cache, compiled where need be."""
    shipped = {info.spec.identity: info for info in plan.bundle.objects}

    def resolve(spec: KernelSpec) -> Path:
        info = shipped.get(spec.identity)
        if info is None or not plan.files:  # none where a bundle is given without saying where it lies
            return compiled_here(spec)
        file = plan.files.get(info.key)
        if file is None or read_info(file).to_json() != info.to_json():
            raise ObjectError(
                f"compiled kernel {info.file_name} is not beside the bundle: load the bundle from where it was exported"
            )
        return file

    return resolve


def compiled_object(spec: KernelSpec) -> tuple[ObjectInfo, Path]:
    """A kernel from this machine's cache, compiled if it is not there.

    Raises:
        CompileError: it cannot be compiled; the message says why, with the cure.
    """
    from autokernel.cutedsl.cache import ObjectCache

    return ObjectCache().get_or_compile(spec)


def compiled_here(spec: KernelSpec) -> Path:
    """The file of `compiled_object`; a cache that cannot be written is no reason for a model not to run, either.

    Raises:
        CompileError: there is none.
    """
    try:
        return compiled_object(spec)[1]
    except StorageError as error:
        raise CompileError(str(error)) from None


def with_objects(bundle: Bundle) -> tuple[Bundle, dict[str, Path]]:
    """A bundle with the objects of all kernels that its entries may need, and their files by key.

    They come from this machine's cache. One that cannot be compiled here is left out, with a warning: where the bundle is used
    it will be compiled, or stock code runs in its place.
    """
    number = bundle.environment.isa.removeprefix("sm_")
    found: dict[str, tuple[ObjectInfo, Path]] = {}
    for entry in filter(is_cute, bundle.entries):
        arch = arch_of((int(number[:-1]), int(number[-1])))
        for spec in specs_of(entry, arch=arch, num_units=bundle.environment.num_units):
            try:
                info, path = compiled_object(spec)
            except CompileError as error:
                log.warning("autokernel: the bundle has no compiled kernel for %s: %s", entry.key, error)
                continue
            found[info.key] = info, path
    objects = tuple(info for info, _ in found.values())
    return replace(bundle, objects=objects), {key: path for key, (_, path) in found.items()}


class CutePass(CustomGraphPass):
    """Puts compiled kernels in the place of GEMMs that have an entry of backend "cutedsl". Cached code names the files."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._resolve = objects_of(plan)

    def uuid(self) -> str:
        facts = [
            *(str(target._schema) for target in (op.PLAIN, op.FUSED, op.SQUARES)),
            *sorted(map(str, self.plan.files.values())),
        ]
        return f"autokernel-cutedsl-{digest_of(facts)}-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active or not any(is_cute(entry) for entry in self.plan.bundle.entries):
            return
        if V.aot_compilation:
            for unused in filter(is_cute, self.plan.bundle.entries):
                self.plan.skip(unused, NO_PACKAGE)
            return
        order = {node: position for position, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            gemm = gemm_of_node(node)
            entry = self.plan.find_or_merged(gemm) if gemm is not None else None
            if entry is None or not is_cute(entry):
                continue
            try:
                site = self._site(node, entry, order)
            except (ValueError, ObjectError, CompileError) as error:
                self.plan.skip(entry, f"{error} (at {node.name})")
                continue
            site.replace(graph, order)
            self.plan.hit(entry)

    def _site(self, node: torch.fx.Node, entry: Entry, order: Mapping[torch.fx.Node, int]) -> Site:
        """What to put in the place of a GEMM.

        Raises:
            ValueError, ObjectError, CompileError: stock code has to stay; the message says why.
        """
        product = Product.of(node)
        left, right = (spec_of_value(operand.meta["val"]) for operand in (product.x, product.w))
        fused = self._fused(node, product, entry, order)
        device = node.meta["val"].device
        kernel = spec_for(
            entry.config,
            left,
            right,
            out_dtype=dtype_name(node.meta["val"].dtype),
            epilogue=(*product.inside, *(() if fused is None else expected_epilogue(entry.problem))),
            arch=arch_of(torch.cuda.get_device_capability(device)),
            num_units=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        path = str(self._resolve(kernel))
        load(path)  # what cannot be loaded is found out here, where stock code is still to be had
        return Site(
            node=node,
            product=product,
            operands=() if fused is None else (*product.added, *fused.operands),
            kinds=() if fused is None else _kinds(product, fused),
            added=product.added if fused is None else (),
            last=node if fused is None else fused.last,
            path=path,
            swizzle=CuteConfig.from_entry(entry.config).swizzle_of_calls,
            parts=kernel.num_parts > 0,
        )

    def _fused(
        self, node: torch.fx.Node, product: Product, entry: Entry, order: Mapping[torch.fx.Node, int]
    ) -> Epilogue | None:
        """What follows the product here, if the entry fuses exactly that; None where it stays behind the kernel."""
        expected = expected_epilogue(entry.problem)
        if not expected or not CuteConfig.from_entry(entry.config).fuse:
            return None
        if expected[0] in GATED_EPILOGUES:
            gated = _gated_halves(node) if not product.added else None  # its kernel adds nothing
            return gated if gated is not None and gated.names == expected else None
        found = find_epilogue(node, order)
        own = tuple(BIAS if argument.meta["val"].dim() == 1 else ADD for argument in product.added)
        values = [argument.meta["val"] for argument in (*product.added, *found.operands)]
        readable = all(map(_is_readable, values, _kinds(product, found)))
        return found if (*own, *found.names) == expected and readable else None


def _kinds(product: Product, found: Epilogue) -> tuple[str, ...]:
    """Of the operands of what is fused: what the product adds itself, then those of the steps behind it."""
    own = [PER_COLUMN if argument.meta["val"].dim() == 1 else "" for argument in product.added]
    return (*own, *(operand_kind(name) for name in found.names if name in BINARY_EPILOGUES))


def _is_readable(value: torch.Tensor, kind: str) -> bool:
    """Whether a kernel can read an operand of this kind: see `ops.epilogue.operand_kind`."""
    if value.storage_offset() % ALIGNMENT_BYTES:
        return False
    return value.is_contiguous() if kind else has_aligned_rows(spec_of_value(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A GEMM's node, taken apart: the matrices, the scales that belong to it, and what it adds."""

    x: torch.fx.Node
    w: torch.fx.Node
    inside: tuple[str, ...] = ()  # names of the scales, as an epilogue has them
    scales: tuple[torch.fx.Node, ...] = ()
    added: tuple[torch.fx.Node, ...] = ()

    @classmethod
    def of(cls, node: torch.fx.Node) -> Product:
        """The parts of a node for which `gemm_of_node` has an answer.

        Raises:
            ValueError: it is more than a product and a sum.
        """
        if (call := ScaledCall.of(node)) is not None:
            x, w, *rest = call.operands
            return cls(x=x, w=w, inside=SCALES[call.scaling], scales=tuple(rest[:2]), added=tuple(rest[2:]))
        if any(value != 1 for value in node.kwargs.values()):
            raise ValueError("the product is scaled")
        *added, x, w = (argument for argument in node.args if isinstance(argument, torch.fx.Node))
        return cls(x=x, w=w, added=tuple(added))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A GEMM of the graph that a compiled kernel takes over, from its node to the last that is fused into it.

    `operands` of `kinds` (see `ops.epilogue.operand_kind`) go into the kernel, which leaves `parts` of K to be
    summed, or none; `added` is what the GEMM's own node adds, where that is left to Inductor.
    """

    node: torch.fx.Node
    product: Product
    operands: tuple[torch.fx.Node, ...]
    kinds: tuple[str, ...]
    added: tuple[torch.fx.Node, ...]
    last: torch.fx.Node
    path: str
    swizzle: int
    parts: bool

    def replace(self, graph: torch.fx.Graph, order: dict[torch.fx.Node, int]) -> None:
        """Put the kernel's call in the place of all of it; and into the order, for a later GEMM may take its result."""
        value, before = self.node.meta["val"], self.node.prev
        with graph.inserting_before(self.node):
            operands = [viewed(graph, scale, (scale.meta["val"].numel(),)) for scale in self.product.scales]
            for operand, kind in zip(self.operands, self.kinds, strict=True):
                shape = (operand.meta["val"].numel(),) if kind else tuple(value.shape)
                operands.append(viewed(graph, operand, shape))
            target, arguments = op.call_arguments(self.product.x, self.product.w, operands, self.path, self.swizzle)
            result = called(graph, target, *arguments)
            if self.parts:
                result = called(graph, aten.sum.dim_IntList, result, [0])
                result = called(graph, prims.convert_element_type.default, result, value.dtype)
            for extra in self.added:
                result = called(graph, aten.add.Tensor, result, extra)
            result = viewed(graph, result, tuple(self.last.meta["val"].shape))
        new = before.next
        while new is not self.node:
            order[new] = order[self.node]
            new = new.next
        self.last.replace_all_uses_with(result)
        _erase(graph, self.last, order[self.node], order)


def _gated_halves(node: torch.fx.Node) -> Epilogue | None:
    """What becomes of a product of two weights side by side, if that is `f(first half) * second half` alone."""
    (split,) = node.users if len(node.users) == 1 else (None,)
    if split is None or split.target is not aten.split_with_sizes.default:
        return None
    halves = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    sizes = list(split.args[1])  # type: ignore[arg-type]
    if len(split.users) != 2 or set(halves) != {0, 1} or len(set(sizes)) != 1:
        return None
    found = find_gated(halves[0], halves[1])
    return None if found is None else Epilogue(names=(found[0],), operands=(), operand_specs=(), last=found[1], end="")


def viewed(graph: torch.fx.Graph, node: torch.fx.Node, shape: tuple[int, ...]) -> torch.fx.Node:
    """The node in another shape with as many elements; itself where it has that shape."""
    return node if tuple(node.meta["val"].shape) == shape else called(graph, aten.reshape.default, node, list(shape))


def called(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    """A call where the graph's insertion point is, with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def _erase(graph: torch.fx.Graph, last: torch.fx.Node, first: int, order: Mapping[torch.fx.Node, int]) -> None:
    """Take a node that nobody uses any more out of the graph, and what only it needed, back to a position."""
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if not node.users and order.get(node, -1) >= first:
            sources = node.all_input_nodes
            graph.erase_node(node)
            waiting += [source for source in sources if source not in waiting]
