"""Is a built candidate right, and does it really compute? Its outputs and manners -> Verdict.

Everything that a verdict needs from the reference is computed by `expect`, before any candidate code is loaded. `Checker`
then runs the candidate: on the model's draw twice over differently poisoned memory, on every other draw in the same
buffers, on the first contents again at other addresses, in the middle of the timing, and on new inputs after it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autokernel.backends import Built
from autokernel.evaluate import poison
from autokernel.evaluate.budget import Errors, Expected, all_finite, errors_of_outputs, expected_of_copies
from autokernel.evaluate.probes import DRAWS, derived_seed, draw_scale, join, make_variables
from autokernel.evaluate.tensors import (
    Snapshot,
    alias_problem,
    each_different,
    fill,
    metadata_problem,
    num_different,
    plain_problem,
    rows_of,
    synchronize,
    twin,
)
from autokernel.ops import ChoosingOp, Op
from autokernel.records import Check, Problem, Verdict

if TYPE_CHECKING:
    import torch

_EDGES = "edges"
_SETTLE_S = 0.02  # long enough for a thread that was left running to be seen writing
_KEPT_BYTES = 32 << 20  # of contents: larger ones are drawn again where they are wanted
Contents = list[list["torch.Tensor"]]  # per copy, the non-constant inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one copy is given in one call. `first` stands for the first of the non-constant inputs as it is drawn."""

    seed: int
    draw: str
    scale: float
    first: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return self.draw if self.first is None else _EDGES

    def variables(self, problem: Problem) -> list[torch.Tensor]:
        """The non-constant inputs, the same each time, in a memory of their own."""
        made = make_variables(problem, self.seed, self.draw, scale=self.scale)
        if self.first is not None:
            made[0].copy_(self.first)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of `Built.run`: what every copy is given, and what it has to return. `kept` are small contents."""

    slots: tuple[Slot, ...]
    expected: tuple[tuple[Expected, ...], ...]  # [copy][output]
    kept: Contents | None = None

    def contents(self, problem: Problem) -> Contents:
        """The non-constant inputs of every copy, the same each time, in a memory of their own."""
        if self.kept is not None:
            return [[twin(x) for x in copy] for copy in self.kept]
        return [slot.variables(problem) for slot in self.slots]

    def put_into(self, buffers: Contents, problem: Problem) -> None:
        """The same contents at the buffers' addresses."""
        contents = self.kept if self.kept is not None else [slot.variables(problem) for slot in self.slots]
        fill([x for copy in buffers for x in copy], [x for copy in contents for x in copy])

    @property
    def output_sizes(self) -> list[int]:
        return [e.num_bytes for copy in self.expected for e in copy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """References and budgets of every call that will be made, from before candidate code is loaded."""

    model: Call  # every copy at the model's scale: poison pair, timing
    probes: tuple[Call, ...]  # every other draw at least once
    fresh: Call  # after timing


def num_references(op: Op, num_copies: int) -> int:
    """How many references `expect` computes."""
    num_calls = 2 + math.ceil((len(DRAWS) - 1) / num_copies) + isinstance(op, ChoosingOp)
    return num_calls * num_copies


def expect(op: Op, problem: Problem, constants: list[list[torch.Tensor]], seed: int) -> Expectation:
    """Compute references and eager's errors.

    Args:
        op: whose plain torch function is the reference.
        problem: what is solved.
        constants: per copy, the constant inputs.
        seed: fresh for every check.
    """
    num_copies = len(constants)
    each = sum(spec.num_bytes for i, spec in enumerate(problem.inputs) if i not in problem.constants)
    small = num_copies * each <= _KEPT_BYTES
    shuffled = random.Random(seed)
    others = [draw for draw in DRAWS if draw not in ("model", "cancellation")]
    shuffled.shuffle(others)
    others.insert(0, "cancellation")  # copy 0's constants are the ones that make it cancel
    num_calls = max(1, math.ceil(len(others) / num_copies))
    draws = [others[i % len(others)] for i in range(num_calls * num_copies)]
    fresh = [DRAWS[i % len(DRAWS)] for i in range(num_copies)]
    shuffled.shuffle(fresh)

    def slots(name: object, names: Sequence[str]) -> list[Slot]:
        return [_slot(op, problem, constants[i], derived_seed(seed, name, i), draw) for i, draw in enumerate(names)]

    def call(slots: Sequence[Slot]) -> Call:
        contents: Contents = []

        def inputs() -> Iterator[list[torch.Tensor]]:
            for slot, fixed in zip(slots, constants, strict=True):
                variables = slot.variables(problem)
                if small:
                    contents.append(variables)
                yield join(problem, variables, fixed)

        expected = expected_of_copies(op, problem, inputs())
        return Call(slots=tuple(slots), expected=tuple(expected), kept=contents if small else None)

    model = slots("model", ["model"] * num_copies)
    probes = [slots(i, draws[i * num_copies : (i + 1) * num_copies]) for i in range(num_calls)]
    if isinstance(op, ChoosingOp):
        probes.append([_at_the_edges(op, problem, *pair) for pair in zip(model, constants, strict=True)])
    return Expectation(model=call(model), probes=tuple(map(call, probes)), fresh=call(slots("fresh", fresh)))


def _slot(op: Op, problem: Problem, fixed: Sequence[torch.Tensor], seed: int, draw: str) -> Slot:
    """A slot; "large" is made smaller until eager stays finite at twice the scale: overflow itself is not what it tests."""
    import torch

    scale = draw_scale(problem, draw)
    with torch.no_grad():
        while draw == "large" and scale > 1:
            inputs = join(problem, make_variables(problem, seed, draw, scale=2 * scale), fixed)
            if all_finite(op.reference(problem, *inputs)):
                break
            scale /= 4
    return Slot(seed=seed, draw=draw, scale=max(scale, 1.0) if draw == "large" else scale)


def _at_the_edges(op: ChoosingOp, problem: Problem, slot: Slot, fixed: Sequence[torch.Tensor]) -> Slot:
    """With the last score of every other row as the largest, and the first one of those between.

    Of a hundred thousand scores hardly ever one at an edge is the largest: a kernel that forgets some there would not be seen.
    Scores grow the fastest along their gradient.
    """
    import torch

    variables = slot.variables(problem)
    with torch.enable_grad():
        variables[0].requires_grad_()
        scores = op.scores(problem, *join(problem, variables, fixed))[-1]
        rows = scores.reshape(-1, scores.shape[-1])
        (gradient,) = torch.autograd.grad(rows[::2, -1].sum() + rows[1::2, 0].sum(), variables[:1])
    size = gradient.float().square().mean().sqrt().clamp(min=1e-9)
    return replace(slot, first=gradient / size)


def check(
    op: Op,
    problem: Problem,
    built: Built,
    constants: list[list[torch.Tensor]],
    *,
    seed: int,
    deterministic_required: bool = False,
) -> Verdict:
    """All checks at once, for callers that do not time in between."""
    checker = Checker(problem, built, constants, expect(op, problem, constants, seed))
    checker.before_timing()
    if checker.passed:
        checker.after_timing()
    return checker.verdict(deterministic_required)


class Checker:
    """Runs one built candidate and collects its checks; each check keeps its worst case."""

    def __init__(self, problem: Problem, built: Built, constants: list[list[torch.Tensor]], expectation: Expectation) -> None:
        self._problem, self._built, self._constants = problem, built, constants
        self._expectation = expectation
        self._constants_before = Snapshot([x for fixed in constants for x in fixed])
        self._checks: dict[str, Check] = {}
        self._perturb = problem.device == "cpu" and poison.can_perturb()
        self._num_nondeterministic = 0
        self._usable = True  # outputs have the right number, type and shape, so they can be compared

    @property
    def passed(self) -> bool:
        return self._usable and all(check.passed for check in self._checks.values())

    @property
    def deterministic(self) -> bool:
        return self._num_nondeterministic == 0

    def before_timing(self) -> None:
        """The poison pair, every draw in the same buffers, and the first contents at other addresses."""
        call = self._expectation.model
        buffers = call.contents(self._problem)
        first = self._run(call, buffers, poison.PERTURB_BYTES[0], settle=True)
        if first is None:
            return
        self._judge_draws(call, first)
        second = self._run(call, buffers, poison.PERTURB_BYTES[1], earlier=first)
        if second is None:
            return
        self._judge_draws(call, second)
        self._judge_pair(first, second)
        previous_call, previous = call, second
        for probe in self._expectation.probes:
            probe.put_into(buffers, self._problem)
            outputs = self._run(probe, buffers, poison.PERTURB_BYTES[0], earlier=previous)
            if outputs is None:
                return
            self._judge_draws(probe, outputs)
            self._judge_change(previous_call, previous, probe, outputs)
            previous_call, previous = probe, outputs
        elsewhere = call.contents(self._problem)  # while the old buffers are still there, so at other addresses
        outputs = self._run(call, elsewhere, poison.NAN_BYTE, earlier=previous)
        if outputs is not None:
            self._judge_all("fresh_buffers", call, outputs)

    def timing_inputs(self) -> Contents:
        """Buffers with the model's draw; `audit` changes them for a moment."""
        return self._expectation.model.contents(self._problem)

    def audit(self, buffers: Contents, run: Callable[[], Iterable[Any]]) -> None:
        """In the middle of the timing: the timed call on other contents of the timed buffers must be right.

        Args:
            buffers: what `timing_inputs` returned; their contents are put back.
            run: the call as it is timed (a graph's replay on a GPU).
        """
        call = self._expectation.probes[0]
        call.put_into(buffers, self._problem)
        synchronize(self._problem.device)
        with self._poison(call, poison.PERTURB_BYTES[0]):
            outputs = tuple(run())
        synchronize(self._problem.device)
        if self._well_formed(call, outputs):
            self._judge_all("audit_while_timing", call, outputs)
        self._expectation.model.put_into(buffers, self._problem)

    def after_timing(self) -> None:
        """New inputs in new buffers: still right."""
        call = self._expectation.fresh
        outputs = self._run(call, call.contents(self._problem), poison.PERTURB_BYTES[1], settle=True)
        if outputs is not None:
            self._judge_all("repeat_fresh", call, outputs)

    def add(self, check: Check) -> None:
        """Take a check made elsewhere (physics)."""
        self._note(check.name, check.value, check.limit, check.note)

    def verdict(self, deterministic_required: bool = False) -> Verdict:
        """All checks so far. Nondeterminism fails only where determinism is required."""
        limit = 0.0 if deterministic_required else math.inf
        self._note("deterministic", self._num_nondeterministic, limit, "elements that differ between two runs")
        return Verdict(checks=tuple(self._checks.values()))

    def _run(
        self,
        call: Call,
        buffers: Contents,
        byte: int,
        earlier: Sequence[torch.Tensor] = (),
        settle: bool = False,
    ) -> tuple[torch.Tensor, ...] | None:
        """One call with its manners judged; None if the outputs are not fit to be compared."""
        import torch

        device = self._problem.device
        flat = [x for copy in buffers for x in copy]
        before = Snapshot(flat)
        synchronize(device)
        with torch.no_grad(), self._poison(call, byte):
            returned = self._built.run(*flat)
        outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        if not self._well_formed(call, outputs):
            return None
        at_return = rows_of(outputs, copy=True)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        synchronize(device)
        if settle and device == "cpu":
            time.sleep(_SETTLE_S)
        late = sum(num_different(x, y) for x, y in zip(rows_of(outputs), at_return, strict=True))
        self._note("finished_on_return", late, 0, "elements that changed after the call had returned")
        changed = before.num_changed() + self._constants_before.num_changed()
        fixed = [x for copy in self._constants for x in copy]
        self._note("inputs_unchanged", changed, 0, "inputs and constants that the call wrote to")
        shares = [e.shares_with for copy in call.expected for e in copy]
        problem = alias_problem(outputs, [*flat, *fixed], earlier, shares, len(call.expected[0]))
        self._note("no_alias", float(bool(problem)), 0, problem)
        return outputs

    def _poison(self, call: Call, byte: int) -> Any:
        return poison.poisoned(self._problem.device, byte, call.output_sizes, perturb=self._perturb)

    def _well_formed(self, call: Call, outputs: Sequence[Any]) -> bool:
        expected = [e for copy in call.expected for e in copy]
        lazy = plain_problem(outputs)
        self._note("plain_tensors", float(bool(lazy)), 0, lazy)
        wrong = "" if lazy else metadata_problem(outputs, expected, len(call.expected[0]))
        self._note("metadata", float(bool(wrong)), 0, wrong)
        self._usable = self._usable and not lazy and not wrong
        return not lazy and not wrong

    def _judge_draws(self, call: Call, outputs: Sequence[torch.Tensor]) -> None:
        for slot, expected, errors in _judged(call, outputs):
            self._note(f"error_max[{slot.name}]", errors.max, expected.limit_max)
            self._note(f"error_norm[{slot.name}]", errors.norm, expected.limit_norm)
            note = f"elements whose NaN, +Inf, -Inf or finite class is not eager's, draw {slot.name}"
            self._note("nonfinite_placement", errors.misplaced, 0, note)

    def _judge_all(self, name: str, call: Call, outputs: Sequence[torch.Tensor]) -> None:
        """One check for a whole call: the worst error as a multiple of its budget."""
        for slot, expected, errors in _judged(call, outputs):
            worst = max(_ratio(errors.max, expected.limit_max), _ratio(errors.norm, expected.limit_norm))
            self._note(name, math.inf if errors.misplaced else worst, 1, f"worst error over its budget, draw {slot.name}")

    def _judge_pair(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        """Same inputs, memory poisoned differently: what shows both poisons was not written."""
        one, two = poison.PERTURB_BYTES
        pairs = list(zip(rows_of(first), rows_of(second), strict=True))
        unwritten = sum(int((poison.looks_poisoned(x, one) & poison.looks_poisoned(y, two)).sum()) for x, y in pairs)
        how = "the allocator" if self._perturb else "blocks filled and freed before the run"
        self._note("outputs_written", unwritten, 0, f"elements that still hold the poison put there by {how}")
        self._num_nondeterministic += sum(num_different(x, y) for x, y in pairs)

    def _judge_change(self, before: Call, old: Sequence[torch.Tensor], after: Call, new: Sequence[torch.Tensor]) -> None:
        """The same buffers with other contents must give other outputs, where the references differ."""
        stuck = 0
        was_expected, now_expected = ([e for copy in call.expected for e in copy] for call in (before, after))
        for moved, was, now in zip(each_different(old, new), was_expected, now_expected, strict=True):
            if moved or was.scores is not None:  # an index that stayed is judged by its new score
                continue
            distance = (was.reference.double() - now.reference.double()).abs().nan_to_num(0, 0, 0)
            stuck += distance.numel() > 0 and distance.max().item() > was.limit_max + now.limit_max
        self._note("follows_inputs", stuck, 0, "outputs that did not change with the contents of the same buffers")

    def _note(self, name: str, value: float, limit: float, note: str = "") -> None:
        """Keep the worst case of each check."""
        value, limit = float(value), float(limit)
        known = self._checks.get(name)
        if known is None or _ratio(value, limit) > _ratio(known.value, known.limit):
            self._checks[name] = Check(name=name, value=value, limit=limit, passed=value <= limit, note=note)


def _judged(call: Call, outputs: Sequence[torch.Tensor]) -> list[tuple[Slot, Expected, Errors]]:
    """Each output's errors."""
    pairs = [(slot, e) for slot, copy in zip(call.slots, call.expected, strict=True) for e in copy]
    errors = errors_of_outputs(outputs, [e for _, e in pairs])
    return [(slot, e, found) for (slot, e), found in zip(pairs, errors, strict=True)]


def _ratio(value: float, limit: float) -> float:
    if value == 0:
        return 0.0
    return value / limit if limit > 0 else math.inf
