"""Does the production path hold on another version of torch? Every way an entry can be used, checked in fresh processes.

    python benchmarks/torch_versions.py                          # with the torch that is installed here
    python benchmarks/torch_versions.py --install 2.11.0 2.15.0  # in a virtual environment for each version

Needs torch and numpy alone: the bundles are made by hand, for a model of three layers. Prints one line per check and, at the
end, one line of JSON per version (with `--json`, into that file instead). `--find-links` names a folder with wheels, `--keep`
a folder for the environments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import autokernel
from autokernel.export.bundle import Bundle, Entry, ScenarioOptions, read_bundle, write_bundle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from gated_layers import BATCHES, BOTH, BOTH_BIASED, DOWN, GATE, HIDDEN, Gated, K, M, bf16, bundle_of, entry  # noqa: E402


def differs(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> str | None:
    worst = (actual.double() - expected.double()).abs().max().item()
    return None if worst <= tolerance else f"the output differs by {worst:.3g}"


def serves(model: torch.nn.Module, *entries: Entry, hits: list[int], tolerance: float = 1e-4, **options: Any) -> str | None:
    """Compile with these entries: right, hit as often as expected, nothing benchmarked."""
    x = torch.randn(M, K, dtype=next(model.parameters()).dtype)
    benchmarks = counters["inductor"]["select_algorithm_autotune"]
    backend = autokernel.backend(bundle_of(*entries, **options))
    wrong = differs(torch.compile(model, backend=backend, fullgraph=True)(x), model(x), tolerance)
    counted = [usage.hits for usage in backend.usage().values()]
    benchmarks = counters["inductor"]["select_algorithm_autotune"] - benchmarks
    if wrong is None and counted != hits:
        wrong = f"hits {counted}, not {hits}: {[usage.reasons for usage in backend.usage().values()]}"
    return wrong or (f"{benchmarks} benchmarks" if benchmarks else None)


def generated(model: torch.nn.Module, bundle: Bundle, x: torch.Tensor) -> str:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=autokernel.backend(bundle))
    return str(torch._inductor.utils.run_and_get_code(compiled, x)[1][0])


def factors() -> str | None:
    threads = torch.get_num_threads()
    config = {"threads_m": 1, "threads_n": threads, "threads_k": 1, "block_m": 1, "block_n": 2, "block_k": 8}
    tuned = bundle_of(entry(GATE, "inductor", template="cpp_gemm", **config))
    plain = bundle_of(entry(GATE, "inductor", template="cpp_gemm"))
    model, x = Gated(), torch.randn(M, K)
    sources = [generated(model, bundle, x) for bundle in (tuned, plain)]
    found = ["Kc_blocks = 8;" in source for source in sources]
    return None if found == [True, False] else f"the entry's blocks in the generated code: {found}, not [True, False]"


def changed_weights() -> str | None:
    model, x = Gated(), torch.randn(M, K)
    compiled = torch.compile(model, backend=autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True))))
    compiled(x)
    model.gate.weight.mul_(-2)
    wrong = differs(compiled(x), model(x))
    model.up.weight = torch.nn.Parameter(torch.randn(HIDDEN, K))
    return wrong or differs(compiled(x), model(x), 1e-3)


def gradients() -> str | None:
    model, x = Gated(), torch.randn(M, K)
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    with torch.enable_grad():
        torch.compile(model, backend=backend)(x).sum().backward()
    return None if model.gate.weight.grad is not None else "no gradient"


def threads() -> str | None:
    model, x = Gated(), torch.randn(M, K)
    backend = autokernel.backend(bundle_of(entry(GATE, "inductor", template="cpp_gemm")))
    seen: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            seen.append(torch.compile(model, backend=backend)(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    hits = next(iter(backend.usage().values())).hits
    return differs(seen[0], model(x)) or (None if hits == 2 else f"{hits} hits, not 2")


def options() -> str | None:
    model, x = Gated(), torch.randn(M, K)
    packed = counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]
    with torch._dynamo.config.patch(prepare_freezing=True):
        chosen = dict(autokernel.options(bundle_of(entry(GATE, "inductor", template="cpp_gemm"))))
        wrong = differs(torch.compile(model, options=chosen)(x), model(x))
    packed = counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] - packed
    return wrong or (None if packed else "nothing was packed")


def of_one_scenario() -> str | None:
    """Packing everything, for graphs of M rows alone."""
    products = (f"float32 {M}x{HIDDEN}x{K}", f"float32 {M}x{K}x{HIDDEN}")
    part = ScenarioOptions(scenario="s", products=tuple(sorted(products)), options={"freezing": "all"})
    model, packed = Gated(), []
    for rows in (M, M + 1):
        torch.compiler.reset()
        before = counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]
        x = torch.randn(rows, K)
        compiled = torch.compile(
            model, backend=autokernel.backend(replace(bundle_of(), scenario_options=(part,))), fullgraph=True
        )
        if wrong := differs(compiled(x), model(x)):
            return wrong
        packed.append(counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] - before)
    return None if packed[0] and not packed[1] else f"packed with {packed} matches, not only the first"


def foreign() -> str | None:
    made = bundle_of(entry(GATE, "aten", prepack=True))
    backend = autokernel.backend(replace(made, environment=replace(made.environment, torch="1.0")))
    model, x = Gated(), torch.randn(M, K)
    wrong = differs(torch.compile(model, backend=backend)(x), model(x))
    usage = next(iter(backend.usage().values()))
    return wrong or (None if usage.hits == 0 and "torch 1.0" in usage.reasons[0] else f"{usage}")


def cache() -> str | None:
    """A compiled graph is found again for the same bundle, and not for another. (Packed weights are never cached.)"""
    model, x = Gated(), torch.randn(M, K)
    first, second = (bundle_of(epilogue_fusion=fused) for fused in (False, True))
    seen = []
    for bundle in (first, first, second):
        torch.compiler.reset()
        before = counters["inductor"]["fxgraph_cache_hit"]
        wrong = differs(torch.compile(model, backend=autokernel.backend(bundle))(x), model(x))
        if wrong:
            return wrong
        seen.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    return None if seen == [0, 1, 0] else f"cache hits {seen}, not [0, 1, 0]"


def batches() -> str | None:
    left, right = torch.randn(4, 32, K), torch.randn(4, K, 48)
    hits = []
    for _ in range(2):
        torch.compiler.reset()
        backend = autokernel.backend(bundle_of(entry(BATCHES, "inductor", template="cpp_bmm")))
        wrong = differs(torch.compile(torch.bmm, backend=backend)(left, right), torch.bmm(left, right))
        if wrong:
            return wrong
        hits.append(next(iter(backend.usage().values())).hits)
    return None if hits == [1, 1] else f"hits {hits}, not [1, 1]"


def alone() -> str | None:
    loaded = {"ray", "optuna", "mlflow", "pydantic", "typer", "rich", "transformers", "yaml"} & set(sys.modules)
    return f"{', '.join(sorted(loaded))} were imported" if loaded else None


def written() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        archive = write_bundle(bundle_of(entry(GATE, "aten", prepack=True)), Path(folder) / "bundle")[1]
        return None if read_bundle(archive).entries else "no entries"


class Attending(torch.nn.Module):
    """Heads of q that share keys, behind a mask."""

    def forward(self, q: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = keys.shape
        wide = keys.unsqueeze(2).expand(batch, heads, 2, length, dim).reshape(batch, 2 * heads, length, dim)
        return torch.nn.functional.scaled_dot_product_attention(q, wide, wide, attn_mask=mask, scale=0.25)


class Turning(torch.nn.Module):
    """A rotary embedding by complex numbers."""

    def forward(self, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3)


def fusion(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], op: str, backend: str, implementation: str) -> str | None:
    """A region that is found in the graph is written in another way, and right."""
    from torch._inductor.compile_fx import compile_fx

    from autokernel.ops import get_op

    found: list[Any] = []

    def look(graph: torch.fx.Graph) -> None:
        found.extend(region.problem for region in get_op(op).match(graph, frozenset(), "cpu"))  # type: ignore[attr-defined]

    def stock(gm: Any, examples: list[torch.Tensor], **_: Any) -> Any:
        return compile_fx(gm, examples, config_patches={"post_grad_custom_post_pass": look})

    torch.compile(model, backend=stock, fullgraph=True)(*inputs)
    if len(found) != 1:
        return f"{len(found)} regions, not 1"
    torch.compiler.reset()
    bundled = autokernel.backend(bundle_of(Entry(problem=found[0], backend=backend, config={"implementation": implementation})))
    wrong = differs(torch.compile(model, backend=bundled, fullgraph=True)(*inputs), model(*inputs))
    (usage,) = bundled.usage().values()
    return wrong or (None if usage.hits == 1 else f"{usage.hits} hits, not 1: {usage.reasons}")


def attention(backend: str, implementation: str) -> str | None:
    inputs = (torch.randn(2, 4, 1, 16), torch.randn(2, 2, 33, 16), torch.rand(2, 1, 1, 33) > 0.2)
    return fusion(Attending(), inputs, "attention", backend, implementation)


def rotary() -> str | None:
    inputs = (torch.randn(2, 5, 3, 16), torch.polar(torch.ones(2, 5, 8), torch.randn(2, 5, 8)))
    return fusion(Turning(), inputs, "rotary_complex", "inductor", "real")


def references() -> str | None:
    """What candidates for fusions are compiled from can be traced as one graph."""
    from autokernel.backends.compiled import Copies
    from autokernel.records import Problem, TensorSpec

    x, weight, scale = (TensorSpec.contiguous(shape, "float32") for shape in ((2, 3, 8), (8,), (2, 1, 8)))
    heads, square = (TensorSpec.contiguous(shape, "float32") for shape in ((2, 4, 3, 8), (8, 8)))
    eps, program = (("eps", 1e-5),), (("program", "t0 = mul(i0, i0); t1 = mean(t0); o0 = add(t1, i0)"),)
    for op, specs, scalars in (
        ("rms_norm", (x, weight), eps),
        ("rms_norm", (x, weight), (("rounded", "late"), *eps)),
        ("add_rms_norm", (x, x, weight), eps),
        ("linear_rms_norm", (x, square, weight, x), (("residual", True), *eps)),
        ("rms_norm_linear", (x, weight, square, weight), (("bias", True), *eps)),
        ("rms_norm_qkv", (x, weight, square, square, weight), (("bias", "10"), ("rounded", "late"), *eps)),
        ("adaln_rms_norm", (x, weight, scale), eps),
        ("gated_rms_norm", (x, weight, scale, x), eps),
        ("gated", (x, x), (("activation", "silu"),)),
        ("rotary", (heads, heads, heads), ()),
        ("norm_rotary", (heads, weight, *(TensorSpec.contiguous((2, 3, 4, 8), "float32"),) * 2), eps),
        ("rotary_qk", (heads, weight, heads, weight, heads, heads), (("heads", "first"), *eps)),
        ("attention", (heads, heads, heads), (("causal", True), ("scale", 0.25))),
        ("generated", (x,), program),
    ):
        module = Copies(Problem(op=op, inputs=specs, device="cpu", scalars=scalars), [[], []])
        inputs = [torch.randn(spec.shape) for spec in (*specs, *specs)]
        torch.compiler.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for actual, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            wrong = differs(actual, expected)
            if wrong:
                return f"{op}: {wrong}"
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "bundle written and read": written,
    "packed weights": lambda: serves(
        Gated(), entry(GATE, "aten", prepack=True), entry(DOWN, "aten", prepack=True), hits=[2, 1]
    ),
    "packed weights, bf16": lambda: serves(
        Gated().bfloat16(), entry(bf16(GATE), "aten", prepack=True), hits=[2], tolerance=2e-2
    ),
    "C++ template": lambda: serves(
        Gated(), entry(GATE, "inductor", template="cpp_gemm"), entry(DOWN, "inductor", template="cpp_gemm"), hits=[2, 1]
    ),
    "C++ template, bf16": lambda: serves(
        Gated().bfloat16(), entry(bf16(GATE), "inductor", template="cpp_gemm"), hits=[2], tolerance=2e-2
    ),
    "thread factors and blocks": factors,
    "concat": lambda: serves(Gated(), entry(BOTH, "aten", prepack=False, merge="concat"), hits=[1]),
    "concat, packed": lambda: serves(Gated(), entry(BOTH, "aten", prepack=True, merge="concat"), hits=[1]),
    "concat, packed, with biases": lambda: serves(
        Gated(bias=True), entry(BOTH_BIASED, "aten", prepack=True, merge="concat"), hits=[1]
    ),
    "concat, C++ template": lambda: serves(
        Gated(), entry(BOTH, "inductor", template="cpp_gemm", merge="concat"), hits=[1]
    ),
    "grouped C++ template, bf16": lambda: serves(
        Gated().bfloat16(),
        entry(bf16(BOTH), "inductor", template="cpp_gemm", merge="grouped"),
        hits=[1],
        tolerance=2e-2,
    ),
    "C++ template of batches": batches,
    "attention, products": lambda: attention("inductor", "matmul"),
    "attention, sums": lambda: attention("inductor", "reduction"),
    "attention, the library's with shared heads": lambda: attention("aten", "grouped"),
    "rotary embedding by real numbers": rotary,
    "references of fusions": references,
    "graph options": lambda: serves(Gated(), entry(GATE, "aten", prepack=True), hits=[2], epilogue_fusion=False),
    "graph options of one scenario": of_one_scenario,
    "everything packed": lambda: serves(Gated(), hits=[], freezing="all"),
    "weights changed and exchanged": changed_weights,
    "gradients": gradients,
    "another thread": threads,
    "options form": options,
    "another version's bundle": foreign,
    "cache of compiled graphs": cache,
    "no other library imported": alone,
}  # fmt: skip


def here() -> dict[str, Any]:
    """All checks in this interpreter: {"torch": ..., "passed": ..., "checks": {name: "ok" or what went wrong}}."""
    logging.getLogger("autokernel").setLevel(logging.ERROR)
    outcomes = {}
    for name, check in CHECKS.items():
        torch.compiler.reset()
        try:
            with torch.no_grad():
                outcomes[name] = check() or "ok"
        except Exception as error:  # noqa: BLE001  whatever an unknown version of torch raises is the finding
            outcomes[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        print(f"{torch.__version__:14} {name:44} {outcomes[name]}", flush=True)
    passed = all(outcome == "ok" for outcome in outcomes.values())
    return {"torch": torch.__version__, "python": platform.python_version(), "passed": passed, "checks": outcomes}


@contextlib.contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="autokernel-torch-") as temporary:
        yield Path(temporary)


def in_environment(version: str, folder: Path, find_links: str | None) -> dict[str, Any]:
    """Install one version of torch into an environment of its own, and run the checks there."""
    home = folder / f"torch-{version}"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", f"torch=={version}", "numpy"]
        done = subprocess.run([*install, *(["--find-links", find_links] if find_links else [])], check=False)
        if done.returncode != 0:
            return {"torch": version, "passed": False, "checks": {"install": f"pip ended with {done.returncode}"}}
    answer = folder / f"{version}.json"
    cache = folder / f"cache-{version}"
    shutil.rmtree(cache, ignore_errors=True)  # of an earlier run: one of the checks counts what is found in it
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([str(python), __file__, "--json", str(answer)], env=env, check=False)
    if not answer.exists():
        return {"torch": version, "passed": False, "checks": {"run": f"the checks ended with {done.returncode}"}}
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", nargs="+", metavar="VERSION", help="versions of torch, each in an environment of its own")
    parser.add_argument("--keep", type=Path, help="folder that keeps the environments")
    parser.add_argument("--find-links", help="folder or page with wheels, handed to pip")
    parser.add_argument("--json", type=Path, help="write the summary there")
    arguments = parser.parse_args()
    if arguments.install:
        with folder_for(arguments.keep) as folder:
            results = [in_environment(version, folder, arguments.find_links) for version in arguments.install]
    else:
        # a cache of its own: the last check counts what is found there
        with tempfile.TemporaryDirectory(prefix="autokernel-cache-") as cache:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
            results = [here()]
    if not arguments.json:
        for result in results:
            print(json.dumps(result))
    else:
        arguments.json.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
