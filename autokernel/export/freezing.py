"""Weights as constants, per entry, from inside a `torch.compile` backend.

Inductor packs a weight, and folds weights that lie side by side into one, only if they are constants of the graph. Its own
switch must be thrown before Dynamo traces, freezes everything, and never looks at the weights again. Here the weights that
entries need become constants of the graph that Dynamo hands to the backend, and each call checks that they are still the
same, unchanged tensors. What is written behind a tensor's back (`weight.data += delta`) cannot be seen: `BundleBackend.refresh`
is for that. Nothing of it depends on the device.

The constants are copies: the model's own weights stay alive beside them, and each compiled graph (each shape) has copies of
its own. `Usage.constant_bytes` says how much that is.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.products import Product, can_be_constant

log = logging.getLogger(__name__)

MAX_REFREEZES = 8
MAX_SETS = 128  # layers of a model that share one graph, each with its own weights


def needs_constant(entry: Entry) -> bool:
    """Whether the entry's kernel reads a packed weight."""
    return (
        bool(entry.config.get("prepack")) or entry.config.get("template") == "cpp_gemm" or entry.config.get("merge") == "concat"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Positions of the inputs to freeze, and for which entry how many bytes of them are copied."""

    positions: tuple[int, ...]
    copied: tuple[tuple[Entry, int], ...]


def weights_to_freeze(products: Iterable[Product], values: Sequence[Any], plan: Plan, *, everything: bool = False) -> Frozen:
    """The inputs that are parameters used by a GEMM with an entry that needs them constant; or every parameter.

    Only for graphs without gradients: a constant takes none.

    Args:
        products: of the graph, from `graph_products`.
        values: inputs of the graph, and behind them its `held_parameters`.
        plan: the entries.
        everything: every parameter.
    """
    chosen: set[int] = set()
    copied: list[tuple[Entry, int]] = []
    by_input: dict[Any, list[Product]] = {}  # by shared input
    for product in products:
        entry = plan.find(product.gemm)
        if entry is not None and needs_constant(entry):
            chosen.update(product.constants)
            copied.append((entry, product.num_bytes))
        by_input.setdefault(product.x, []).append(product)
    for members in by_input.values():
        for entry, gemm in plan.groups(members[0].dtype, members[0].m, members[0].k):
            fitting = [product for product in members if product.bias == gemm.bias and product.n in gemm.ns]
            if needs_constant(entry) and _covers(fitting, gemm.ns):
                chosen.update(index for product in fitting for index in product.constants)
                copied.append((entry, sum(product.num_bytes for product in fitting)))
    if everything:
        chosen.update(i for i, value in enumerate(values) if can_be_constant(value))
    return Frozen(positions=tuple(sorted(chosen)), copied=tuple(copied))


def _covers(members: list[Product], ns: tuple[int, ...]) -> bool:
    have = [product.n for product in members]
    return all(have.count(n) >= ns.count(n) for n in ns)


def sizes_change(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether one graph is for several sizes, or numbers: it is compiled when it is made, with symbols, and never at a call."""
    examples = (node.meta.get("example_value", node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder"))
    return any(map(_is_symbolic, (*inputs, *examples)))


def _is_symbolic(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(number, torch.SymInt) for number in (*value.shape, *value.stride()))
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def freeze_inputs(gm: torch.fx.GraphModule, inputs: Sequence[Any], frozen: Sequence[int]) -> torch.fx.GraphModule:
    """A copy of the graph in which these inputs are parameters of the module; the others keep their order."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    root: dict[str, Any] = {name: getattr(gm, name) for name in _attributes(gm)}
    position = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if position in frozen:
                name = f"_autokernel_frozen_{position}"
                weight = inputs[position]
                # not the weight itself: it may go, and this with it
                root[name] = torch.nn.Parameter(weight.detach(), requires_grad=False)
                mapping[node] = graph.get_attr(name)
                mapping[node].meta = {"example_value": node.meta.get("example_value")}
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            position += 1
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    module = torch.nn.Module()
    for name, value in root.items():
        setattr(module, name, value)
    copy = torch.fx.GraphModule(module, graph)
    # without Dynamo's marks, AOTAutograd takes the module's own parameters for what they are
    copy.meta = {key: value for key, value in gm.meta.items() if key != "dynamo_compile_id"}
    return copy


def _attributes(gm: torch.fx.GraphModule) -> list[str]:
    names = {str(n.target).split(".", 1)[0] for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    return sorted(names)


def version_of(tensor: torch.Tensor) -> int:
    """Counts in-place changes; inference tensors have no counter."""
    return -1 if tensor.is_inference() else tensor._version


class _Variant:
    """One compilation, and the weights whose constants it holds. It keeps none of them alive: with the first one that goes,
    the compiled code goes, too. `matches` runs at every call of the model: some 0.15 us a weight."""

    __slots__ = ("_addresses", "_compiled", "_counted", "_ids", "_pick", "_references", "_versions")

    def __init__(self, compiled: Callable[..., Any], inputs: Sequence[Any], frozen: tuple[int, ...]) -> None:
        compiled_code = [compiled]
        self._compiled = compiled_code
        self._pick = _getter(frozen)
        weights = self._pick(inputs)
        self._ids = [*map(id, weights)]
        self._references = [weakref.ref(weight, lambda _: compiled_code.clear()) for weight in weights]
        self._counted = _getter(tuple(i for i, weight in enumerate(weights) if version_of(weight) >= 0))
        self._versions = [weight._version for weight in self._counted(weights)]
        self._addresses = [weight.data_ptr() for weight in weights]

    @property
    def compiled(self) -> Callable[..., Any]:
        """The code, for as long as all weights are there."""
        return self._compiled[0]

    def matches(self, args: Sequence[Any]) -> bool:
        """Whether these are the same tensors, with nothing written into them since that can be seen."""
        weights = self._pick(args)
        return [*map(id, weights)] == self._ids and bool(self._compiled) and self._unchanged(weights)

    def stale(self) -> bool:
        """Whether a weight is gone or was changed: versions only grow, so it never matches again."""
        weights = [reference() for reference in self._references]
        return not self._compiled or any(weight is None for weight in weights) or not self._unchanged(weights)

    def _unchanged(self, weights: Sequence[Any]) -> bool:
        return [weight._version for weight in self._counted(weights)] == self._versions and [
            weight.data_ptr() for weight in weights
        ] == self._addresses


class FrozenGraph:
    """A compiled graph that holds its weights as constants, and looks at each call whether they still are.

    One graph may serve several modules (layers that share code, a weight that was replaced): every set of weights gets a
    compilation of its own, up to `MAX_SETS` that are alive, and up to `MAX_REFREEZES` in place of others that changed or are
    gone; beyond that, the graph is compiled once more without constants. A CUDA graph that was captured around a call replays
    that call's constants, and nothing here runs: capture again after weights were changed.
    """

    def __init__(
        self,
        compile_frozen: Callable[[Sequence[Any]], Callable[..., Any]],
        compile_stock: Callable[[Sequence[Any]], Callable[..., Any]],
        compile_plain: Callable[[Sequence[Any]], Callable[..., Any]],
        attempt: Callable[[Callable[[], Callable[..., Any]]], Callable[..., Any] | None],
        frozen: Sequence[int],
        num_inputs: int,
        inputs: Sequence[Any],
    ) -> None:
        """Compile it with the weights of `inputs`.

        Args:
            compile_frozen: with weights as constants.
            compile_stock: without.
            compile_plain: without anything of the plan: where `attempt` gave up.
            attempt: runs a compilation at a later call; None where it failed and something simpler is to be tried.
            frozen: positions of the weights.
            num_inputs: of the graph.
            inputs: of the graph.
        """
        self._compile_frozen = compile_frozen
        self._compile_stock = compile_stock
        self._compile_plain = compile_plain
        self._attempt = attempt
        self._frozen = tuple(frozen)
        self._kept = _getter(tuple(i for i in range(num_inputs) if i not in set(frozen)))
        self._lock = threading.RLock()
        self._variants: tuple[_Variant, ...] = ()
        self._num_changes = 0
        self._stock: Callable[..., Any] | None = None
        self._add(inputs)

    def _add(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self._compile_frozen(inputs)
        self._variants = (*self._variants, _Variant(compiled, inputs, self._frozen))
        return compiled

    def forget(self) -> None:
        """Whatever the weights are at the next call, they are packed again."""
        with self._lock:
            self._variants = ()

    def __call__(self, *args: Any) -> Any:
        for variant in self._variants:
            if variant.matches(args):
                return variant.compiled(*self._kept(args))
        return self._miss(args)

    def _miss(self, args: Sequence[Any]) -> Any:
        if self._stock is not None:
            return self._stock(*args)
        with _as_dynamo_compiles(), self._lock:  # two threads with the same new weights compile them once
            known = next((variant.compiled for variant in self._variants if variant.matches(args)), None)
            if known is None and self._stock is None and self._may_freeze():
                known = self._attempt(lambda: self._add(args))
            if known is None and self._stock is None:
                self._stock = self._attempt(lambda: self._compile_stock(args)) or self._compile_plain(args)
        return known(*self._kept(args)) if known is not None else self._stock(*args)  # type: ignore[misc]

    def _may_freeze(self) -> bool:
        """Let go of what never matches again, and say whether there is to be another compilation."""
        fresh = tuple(variant for variant in self._variants if not variant.stale())
        changed = len(fresh) < len(self._variants)
        self._variants = fresh
        if (self._num_changes < MAX_REFREEZES) if changed else (len(fresh) < MAX_SETS):
            self._num_changes += changed
            log.info("autokernel: new or changed weights: packing them again")
            return True
        why = (
            f"the weights of one compiled graph changed or were exchanged {MAX_REFREEZES} times"
            if changed
            else f"one compiled graph serves more than {MAX_SETS} sets of weights"
        )
        log.warning("autokernel: %s; from now on it runs without packed weights", why)
        return False


@contextlib.contextmanager
def _as_dynamo_compiles() -> Iterator[None]:
    """One thread at a time, under Dynamo's own lock; calls of other threads are told that something is being compiled."""
    from torch._dynamo.convert_frame import compile_lock

    session = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    with compile_lock, session():
        yield


def _getter(positions: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(positions) > 1:  # faster by far
        return operator.itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)
