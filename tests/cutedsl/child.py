"""What the tests of CuTe DSL kernels do in a process of its own: compilers change the process that imports them.

child.py compile FOLDER     JSON specs on standard input -> objects in a cache in FOLDER; JSON per spec on standard output
child.py preload            a JSON spec -> its object's digest, and what importing the compilers brought along
child.py bind               JSON [[object, sizes], ...] -> how far a call with tensors that say they lie on a GPU gets
child.py epilogues          JSON specs -> the largest errors of their functions, made of torch's activations
child.py functions          -> of each step, the elements on which CuTe DSL and torch differ
child.py operators          JSON {"cases": [[dtype, out_dtype, a_major, b_major, batched], ...], "configs": [config, ...]} ->
                            what Operators offers on SM90, before and after our provider is there, and which of it is chosen
child.py blackwell FOLDER   JSON specs -> names and bytes of compiled operators of SM100; a line for each spec as above
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pretended_cuda import on_gpu

from autokernel.cutedsl import compiler
from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.config import CuteConfig
from autokernel.cutedsl.spec import BIAS, MATRICES, SCALE_A, SCALE_B, SQUARES, KernelSpec
from autokernel.errors import CompileError
from autokernel.ops.epilogue import (
    BINARY_EPILOGUES,
    FUNCTION_EPILOGUES,
    PER_COLUMN,
    PER_ROW,
    apply_epilogue,
    apply_gated,
    operand_kind,
)

SHAPE = (512, 768, 1024)
SEEDED = (4096, 14336, 4096)
_TORCH = {"rdiv": lambda x, other: other / x, "div_by": torch.div, "clamp_min": torch.clamp_min, "clamp_max": torch.clamp_max}


def compile_all(folder: str, specs: Any = None) -> None:
    cache = ObjectCache(Path(folder))
    for given in json.load(sys.stdin) if specs is None else specs:
        try:
            info, path = cache.get_or_compile(KernelSpec.from_json(given))
            print(json.dumps({"path": str(path), "compile_s": info.compile_s}), flush=True)
        except CompileError as error:
            print(json.dumps({"error": str(error)}), flush=True)


def bind_all() -> None:
    """Each call in a process of its own: where the CUDA runtime is missing, it ends without a word to Python."""
    for path, sizes in json.load(sys.stdin):
        with tempfile.TemporaryFile() as said:
            if (child := os.fork()) == 0:
                os.dup2(said.fileno(), 2)
                try:
                    bind(path, sizes)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(1)
            os.waitpid(child, 0)
            said.seek(0)
            print(json.dumps(said.read().decode()), flush=True)


def bind(path: str, sizes: list[int]) -> None:
    """An argument that does not fit raises here."""
    import tvm_ffi

    from autokernel.cutedsl import objects
    from autokernel.cutedsl.call import Device

    found = ObjectCache(Path(path).parent).get(Path(path).stem)
    assert found is not None
    info = found[0]
    function = tvm_ffi.load_module(path)[info.launch.function]
    a, b, out = matrices(info.spec, (3,) if info.spec.batched else (), *sizes)
    operands = [example(name, out) for name in info.spec.operands().values()]
    guards: Any = torch._C._dynamo.guards
    objects.current_gpu = lambda: Device(empty=guards._empty_strided_cpu, stream=lambda device: 0)
    objects.Kernel(info, lambda *arguments: function(*map(on_gpu, arguments)))(a, b, operands)


def matrices(spec: KernelSpec, lead: tuple[int, ...], m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    a_dtype, b_dtype, out_dtype = (getattr(torch, name) for name in (*spec.dtypes, spec.out_dtype))
    a = torch.empty(*lead, m, k, dtype=a_dtype) if spec.a_major == "k" else torch.empty(*lead, k, m, dtype=a_dtype).mT
    b = torch.empty(*lead, k, n, dtype=b_dtype) if spec.b_major == "n" else torch.empty(*lead, n, k, dtype=b_dtype).mT
    return a, b, torch.empty(*lead, m, n, dtype=out_dtype)


def example(name: str, out: torch.Tensor) -> torch.Tensor:
    """An operand of an epilogue's name."""
    if name in MATRICES:
        return torch.rand_like(out)
    if name == BIAS or operand_kind(name) == PER_COLUMN:
        return torch.rand(out.shape[-1]).to(out.dtype)
    if operand_kind(name) == PER_ROW:
        return torch.rand(out.shape[-2]).to(out.dtype)
    return torch.rand({SCALE_A: out.shape[-2], SCALE_B: out.shape[-1]}.get(name, 1))


def epilogues() -> None:
    specs = [KernelSpec.from_json(given) for given in json.load(sys.stdin)]
    with compiler.environment("sm_90a", 132):
        from quack.epilogue.math import Pair
        from quack.gemm_runtime import identity

        from autokernel.cutedsl.epilogue_source import (
            ACTIVATIONS,
            ARITHMETIC,
            FUNCTIONS,
            GATED_RESULT,
            composed,
            epilogue_of,
            gated,
            gelu_tanh,
        )

        by_torch = {name: lambda x, name=name: apply_epilogue((name,), x, ()) for name in ACTIVATIONS}
        by_torch["gelu_tanh"] = lambda x: gelu_tanh(x, torch.sigmoid)
        by_torch |= {name: _TORCH.get(name) or getattr(torch, name) for name in FUNCTIONS}
        known = {"activations": sorted(ACTIVATIONS), "functions": sorted({*ARITHMETIC, *FUNCTIONS})}
        answer: dict[str, Any] = {**known, "errors": [], "digests": [], "by_name": []}
        for spec in specs:
            acc = torch.randn(64, 96, dtype=torch.float64) * 4
            answer["digests"].append(epilogue_of(spec).semantic_digest)
            if spec.gated:
                up = torch.randn(64, 96, dtype=torch.float64)
                got = gated(spec, by_torch)(Pair(acc, up))[GATED_RESULT]
                answer["errors"].append(float((got - apply_gated(spec.epilogue[0], acc, up)).abs().max()))
                continue
            operands = {name: example(taker, acc) for name, taker in spec.operands().items()}
            results = composed(spec, by_torch)(acc, **{n: as_rows(spec.operands()[n], t) for n, t in operands.items()})
            got = results["D"]
            assert set(results) == ({"D", SQUARES} if spec.squares else {"D"})
            assert all(factor is got for factor in results.get(SQUARES, ()))  # which are multiplied
            answer["errors"].append(float((got - expected(spec, acc, operands)).abs().max()))
        identity._is_extern_function = lambda function: True  # as for an installed autokernel
        answer["by_name"] = [epilogue_of(spec).semantic_digest for spec in specs]
        identity._is_extern_function = lambda function: False  # as where all packages are in a folder of their own
        answer["by_source"] = [epilogue_of(spec).semantic_digest for spec in specs]
    print(json.dumps(answer))


def functions() -> None:
    """The steps themselves, compiled for this processor: what CuTe DSL makes of them, not what torch would."""
    with compiler.environment("sm_90a", 132):
        from cutlass import const_expr, cute, range_constexpr
        from cutlass.cute.runtime import from_dlpack

        from autokernel.cutedsl.epilogue_source import ARITHMETIC, FUNCTIONS

        steps = {**ARITHMETIC, **FUNCTIONS}
        values = [0.5, -1.5, 3.0, 2.0, -0.25, 100.0, float("nan"), 1.0, float("inf"), -1.0]
        others = [2.0, 3.0, -0.75, 7.0, -0.125, 3.0, 1.0, float("nan"), 2.0, float("inf")]
        x, y = torch.tensor(values), torch.tensor(others)
        answer: dict[str, list[str]] = {}
        for name, step in steps.items():
            alone, num = name in FUNCTION_EPILOGUES, len(values)
            out = torch.zeros(num)

            @cute.jit
            def run(x, y, out):  # type: ignore[no-untyped-def]
                for i in range_constexpr(num):  # noqa: B023
                    out[i] = step(x[i]) if const_expr(alone) else step(x[i], y[i])  # noqa: B023

            run(from_dlpack(x), from_dlpack(y), from_dlpack(out))
            by_number = {"div_by": "div", "clamp_min": "maximum", "clamp_max": "minimum"}.get(name, name)
            wanted = apply_epilogue((by_number,), x.double(), () if alone else (y.double(),))
            same = torch.isclose(out, wanted.float(), rtol=5e-7, atol=0.0, equal_nan=True)
            told = zip(values, others, out.tolist(), same.tolist(), strict=True)
            answer[name] = [f"of {a} and {b}: {c}" for a, b, c, right in told if not right]
    print(json.dumps(answer))


def as_rows(name: str, operand: torch.Tensor) -> torch.Tensor:
    return operand[:, None] if name == SCALE_A or operand_kind(name) == PER_ROW else operand


def expected(spec: KernelSpec, acc: torch.Tensor, operands: dict[str, torch.Tensor]) -> torch.Tensor:
    """The epilogue by the op's own reference, what belongs to the product written out."""
    takers = spec.operands()
    value = acc
    for operand, name in takers.items():
        if name not in BINARY_EPILOGUES:
            rows = as_rows(name, operands[operand])
            value = value + rows if name == BIAS else value * rows
    rest = [name for name in spec.epilogue if name in BINARY_EPILOGUES or name not in (*takers.values(), SQUARES)]
    given = [as_rows(name, operands[operand]) for operand, name in takers.items() if name in BINARY_EPILOGUES]
    return apply_epilogue(rest, value, given)


def preload() -> None:
    decorators = torch.compile, torch.compiler.disable
    os.environ.update(CUTE_DSL_ARCH="sm_90a", QUACK_ARCH="90", QUACK_CACHE_ENABLED="0")
    import autokernel.cutedsl.preload  # noqa: F401

    assert (torch.compile, torch.compiler.disable) == decorators
    info, _ = compiler.compile_kernel(KernelSpec.from_json(json.load(sys.stdin)))
    imported = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    print(json.dumps({"sha256": info.sha256, "imported": imported}))


def operators() -> None:
    given = json.load(sys.stdin)
    with compiler.environment("sm_90a", 132), tempfile.TemporaryDirectory() as folder:
        from cutlass import operators as package

        def arguments(dtype: str, out_dtype: str, a_major: str, b_major: str, batched: bool, k: int = 1024) -> Any:
            layouts: dict[str, Any] = {"a_major": a_major, "b_major": b_major, "batched": batched}
            spec = KernelSpec(config={}, dtype=dtype, out_dtype=out_dtype, **layouts)
            sums = torch.int32 if dtype == "int8" else torch.float32
            return package.GemmArguments(*matrices(spec, (2,) if batched else (), 512, 768, k), accumulator_type=sums)

        def listed(case: Any, target: str = "90a", **changed: int) -> dict[str, int]:
            found = package.get_operators(arguments(*case, **changed), target_sm=target)
            return dict(Counter(type(operator).__name__ for operator in found))

        cases = given["cases"]
        providers = [*package.available_providers]
        answer: dict[str, Any] = {"alone": [listed(case) for case in cases]}
        from autokernel.cutedsl.operators import AutokernelProvider, chosen

        answer["added"] = [name for name in package.available_providers if name not in providers]
        answer["together"] = [listed(case) for case in cases]
        answer["on_sm100"], answer["unaligned"] = listed(cases[0], "100a"), listed(cases[0], k=1020)
        everything = package.get_operators(arguments(*cases[0]), target_sm="90a")
        name_of = {id(operator): operator.metadata.operator_name for operator in everything}
        answer["names"] = list(name_of.values())
        answer["ours"] = [name_of[id(o)] for o in everything if o.metadata.provider is AutokernelProvider]
        wanted = [chosen(CuteConfig.from_entry(config), "90a") for config in given["configs"]]
        answer["chosen"] = [[name_of[id(o)] for o in everything if takes(o.metadata)] for takes in wanted]
        answer["code"] = {}
        for operator in everything:
            if "Sm80" in name_of[id(operator)]:
                compiled = operator.compile(arguments(*cases[0]), target_sm="90a").compiled_obj
                content = compiler.link(compiled, "kernel", Path(folder))
                answer["code"][name_of[id(operator)]] = hashlib.sha256(content).hexdigest()
    print(json.dumps(answer))


def blackwell(cache_folder: str) -> None:
    specs = json.load(sys.stdin)
    with compiler.environment("sm_100a", 148), tempfile.TemporaryDirectory() as folder:
        from autokernel.cutedsl import blackwell as sm100
        from autokernel.cutedsl.config import BLACKWELL_OTHERS, BLACKWELL_PROBLEMS
        from autokernel.search.nvmatmul_cute import blackwell_seeds

        answer: dict[str, Any] = {"offered": {}, "compiled": [], "seeded": sm100.seeded(SEEDED, 5)}
        answer["named"] = {name: sm100.named(name, SEEDED, blackwell_seeds(name, SEEDED)) for name in BLACKWELL_PROBLEMS}
        chosen = [(problem, SEEDED, names[0]) for problem, names in answer["named"].items() if problem != "dense"]
        for problem in (*BLACKWELL_PROBLEMS, *BLACKWELL_OTHERS):
            offered = sm100.offered(problem, SHAPE)
            answer["offered"][problem] = {kind: len(names) for kind, names in offered.items()}
            ends = (0, -1) if problem == "dense" else (-1,)
            chosen += [(problem, SHAPE, names[end]) for names in offered.values() for end in ends]
        for problem, shape, name in chosen:
            content = compiler.link(sm100.compile_operator(name, problem, shape), "kernel", Path(folder))
            answer["compiled"].append([problem, name, len(content)])
    compile_all(cache_folder, specs)
    print(json.dumps(answer))


if __name__ == "__main__":
    commands = {
        "compile": compile_all, "preload": preload, "bind": bind_all, "epilogues": epilogues, "blackwell": blackwell,
        "operators": operators, "functions": functions,
    }  # fmt: skip
    commands[sys.argv[1]](*sys.argv[2:])
