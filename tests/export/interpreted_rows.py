"""Production with an entry for a range of rows, on the CPU: the kernel runs in Triton's interpreter, all else as it is.

python interpreted_rows.py                 compile a model for several batches; one line of JSON for each
python interpreted_rows.py request.json    what `python -m autokernel.export.prove request.json` does
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import copy
import functools
import json
import sys
from typing import Any

import torch
from torch import nn
from torch._inductor.lowering import fallback_handler

import autokernel
from autokernel.environment import current_environment
from autokernel.export import apply, prove, substitution
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import Gemm
from autokernel.export.pins import dtype_name
from autokernel.kernels.config import SkinnyConfig
from autokernel.kernels.op import launch
from autokernel.records import ConfigValue, Problem, TensorSpec

K, HIDDEN, TUNED = 64, 96, 16
CONFIG: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "split_k": 2,
}  # fmt: skip
RANGE = {"m_min": 9, "m_max": 18}


launched: list[int] = []  # rows of each launch


def up(scenario: str = "", num_parts: int = 1, **config: ConfigValue) -> Entry:
    """For the first layer, or for several of its size that are merged."""
    x = TensorSpec.contiguous((TUNED, K), "float16")
    weight = TensorSpec(shape=(K, HIDDEN), dtype="float16", stride=(1, K))
    op, merge = ("mm", {}) if num_parts == 1 else ("merged_mm", {"merge": "concat"})
    constants = tuple(range(1, num_parts + 1))
    problem = Problem(op=op, inputs=(x, *[weight] * num_parts), device="cpu", constants=constants)
    return Entry(problem=problem, backend="triton", config={**CONFIG, **merge, **config}, scenario=scenario)


@torch.library.custom_op("interpreted::skinny_mm", mutates_args=())
def skinny_mm(x: torch.Tensor, w: torch.Tensor, config: list[int]) -> torch.Tensor:
    """x @ w by the kernel itself."""
    chosen = SkinnyConfig.from_ints(config)
    (m, k), n = x.shape, w.shape[1]
    launched.append(m)
    y = torch.full((m, n), float("nan"), dtype=x.dtype)
    parts = torch.empty(max(1, chosen.num_parts(m, n, k, 1)))
    counters = torch.zeros(max(1, chosen.num_counters(m, n)), dtype=torch.int32)
    launch(chosen, x.contiguous(), w.t().contiguous(), None, y, parts, counters, num_units=1)
    return y


@skinny_mm.register_fake
def _(x: torch.Tensor, w: torch.Tensor, config: list[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def lower(config: SkinnyConfig, num_units: int, x: Any, w: Any, counters: Any = None) -> Any:
    """In the place of the lowering that puts a GPU kernel into Inductor's code."""
    return fallback_handler(torch.ops.interpreted.skinny_mm.default, add_to_fallback_set=False)(x, w, config.to_ints())


def gemm_of_node(node: torch.fx.Node) -> Gemm | None:
    """As on a GPU, of plain products on the CPU."""
    if node.target is not torch.ops.aten.mm.default:
        return None
    x, w = (argument.meta["val"] for argument in node.args)  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in (*x.shape, *w.shape)):
        return None
    return Gemm(dtype_name(x.dtype), 1, x.shape[0], (w.shape[1],), x.shape[1], False)


def pretend() -> None:
    """Products on the CPU may be ours."""
    lower._inductor_lowering_function = True  # type: ignore[attr-defined]
    substitution.lower_skinny_mm = lower
    substitution.gemm_of_node = gemm_of_node
    options = apply.inductor_options

    @functools.wraps(options)
    def with_pass(plan: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # with packed weights there would be no products left, as there are on a GPU
        own: dict[str, Any] = {"cpp.weight_prepack": False, "fx_graph_cache": False}
        own["post_grad_custom_post_pass"] = substitution.SubstitutionPass(plan)
        return {**options(plan, *args, **kwargs), **own}

    apply.inductor_options = with_pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, HIDDEN, bias=False), nn.Linear(HIDDEN, K, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


class Gated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return out


def main() -> None:
    environment = current_environment("cpu", torch.get_num_threads())
    cases: tuple[tuple[str, nn.Module, Entry, bool | None, tuple[int, ...]], ...] = (
        ("fixed", Net(), up(**RANGE), False, (TUNED, 9, 18, 12, 8, 19)),
        ("for several", Net(), up(**RANGE), None, (TUNED, 12, 9)),
        ("merged", Gated(), up("", 2, **RANGE), False, (TUNED, 9, 19)),
    )
    for name, model, entry, dynamic, batches in cases:
        torch.compiler.reset()
        model.half().eval()
        exact = copy.deepcopy(model).double()
        bundle = Bundle(name="b", created="", version="", environment=environment, entries=(entry,))
        backend = autokernel.backend(bundle, on_mismatch="error")
        compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
        for m in batches:
            x, before = torch.randn(m, K).half(), backend.usage()[entry.key].hits
            launched.clear()
            with torch.no_grad():
                expected, out, eager = exact(x.double()), compiled(x).double(), model(x).double()
            error, allowed = float((out - expected).norm()), 2 * float((eager - expected).norm())
            hits = backend.usage()[entry.key].hits - before
            print(json.dumps([name, m, hits, launched, error <= allowed]), flush=True)


if __name__ == "__main__":
    pretend()
    if len(sys.argv) > 1:
        prove.main(sys.argv[1])
    else:
        main()
