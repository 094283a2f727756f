"""Generated kernels in Triton's interpreter and through its compiler for Hopper; no GPU is needed for either."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kernels import for_hopper

from autokernel.kernels.generated_source import row_terms
from autokernel.kernels.launch import AHEAD, KernelPlan
from autokernel.kernels.plans import plan_of
from autokernel.ops.generated import Generated
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
H200 = DeviceFacts(device="cuda", isa="sm_90", device_name="NVIDIA H200", smem_bytes=232448, num_units=132, l2_bytes=50 << 20)
D, F = 4096, 14336
NORM = (
    "t0 = convert(i1, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-05); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, bfloat16); t7 = mul(i0, t6)"
)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path))


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def gated(m: int) -> Problem:
    """Norm, gate, up and SwiGLU of a Llama-3.1-8B."""
    text = (
        f"{NORM}; t8 = reshape(t7, [{m}, {D}]); t9 = t(i2); t10 = mm(t8, t9); t11 = convert(t10, float32); "
        "t12 = sigmoid(t11); t13 = mul(t11, t12); t14 = convert(t13, bfloat16); t15 = t(i3); t16 = mm(t8, t15); "
        "o0 = mul(t14, t16)"
    )
    return Problem(
        op="generated", inputs=(spec(D), spec(m, 1, D), spec(F, D), spec(F, D)), device="cuda", scalars=(("program", text),)
    )


def norm(m: int) -> Problem:
    text = f"{NORM.replace('t7 =', 'o0 =')}"
    return Problem(op="generated", inputs=(spec(D), spec(m, 1, D)), device="cuda", scalars=(("program", text),))


def default(problem: Problem) -> dict[str, ConfigValue]:
    config = load_space("generated")["triton"].default(names_for(Generated().dims(problem), H200))
    assert config is not None
    return config


def residual_fp32(m: int) -> Problem:
    """A product and what is added to it, as in Chronos-2."""
    operands = tuple(TensorSpec.contiguous(shape, "float32") for shape in ((m, 768), (m, 3072), (768, 3072)))
    text = "t0 = t(i2); t1 = mm(i1, t0); o0 = add(i0, t1)"
    return Problem(op="generated", inputs=operands, device="cuda", scalars=(("program", text),))


def ptx_of(problem: Problem, plan: KernelPlan, stage: str = "ptx") -> str:
    return compiled(problem, plan, stage)[0]


def compiled(problem: Problem, plan: KernelPlan, stage: str = "ptx") -> tuple[str, int]:
    """A stage of the compiler, and the bytes of shared memory."""
    assert len(plan.launches) == 1
    kernel = for_hopper.compiled(problem, plan)
    assert kernel.metadata.shared <= H200.smem_bytes
    return str(kernel.asm[stage]), int(kernel.metadata.shared)


@pytest.mark.parametrize(
    "script", ["interpreted_generated", "interpreted_epilogues whole_rows", "interpreted_epilogues batches"]
)
def test_kernels_compute_what_their_programs_do(script: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent), "AUTOKERNEL_CACHE_DIR": str(tmp_path)}
    name, *what = script.split()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(("m", "instruction"), [(1, "fma.rn.f32"), (16, "m64n16k16.f32.bf16"), (64, "m64n64k16.f32.bf16")])
def test_the_spaces_default_compiles_for_hopper(m: int, instruction: str) -> None:
    problem = gated(m)
    ptx = ptx_of(problem, plan_of(problem, default(problem)))
    assert instruction in ptx
    assert "cp.async.cg.shared.global" in ptx, "tiles are read ahead"


def test_weights_are_read_before_the_wait_for_the_kernel_in_front() -> None:
    problem = gated(1)
    plan = plan_of(problem, {**default(problem), "mode": "vector", "block_m": 1, "split_k": 1, "block_k": 1024, "block_n": 4})
    (launch,) = plan.launches
    assert launch.weights == ("i2", "i3")
    assert launch.arguments[AHEAD] == 0
    ahead = replace(plan, launches=(replace(launch, arguments={**launch.arguments, AHEAD: 1}),))
    before, wait, after = ptx_of(problem, ahead).partition("griddepcontrol.wait")
    assert wait
    # 4 rows of 1,024 of each weight, 8 elements at a time by 128 threads: 4 loads of 16 bytes for each of the two
    loads = re.findall(r"ld\.global\S*", before)
    assert len(loads) == 8, loads
    assert "st.global" not in before
    assert "ld.global" in after
    assert "griddepcontrol" not in ptx_of(problem, plan)


@pytest.mark.parametrize("changed", [{"split_k": 2}, {"block_k": 8192}])
def test_kernels_that_cannot_read_weights_ahead_say_so(changed: dict[str, ConfigValue]) -> None:
    problem = gated(1)
    config = {**default(problem), "mode": "vector", "block_m": 1, "split_k": 1, "block_k": 1024, "block_n": 4, **changed}
    (launch,) = plan_of(problem, config).launches
    assert launch.weights is None
    assert AHEAD not in launch.arguments


@pytest.mark.parametrize("mode", ["rows", "swap"])
def test_blocks_of_fp32_products_are_added_up_by_themselves(mode: str) -> None:
    problem = residual_fp32(37)
    config = {**default(problem), "mode": mode, "block_m": 64, "block_n": 64, "block_k": 32, "num_stages": 3, "split_k": 4}
    config["precision"] = "ieee"
    lines = ptx_of(problem, plan_of(problem, config), "ttir").splitlines()
    (product,) = [line for line in lines if "tt.dot " in line]
    assert "inputPrecision" not in product, "ieee is Triton's default"
    assert product.split("tt.dot ")[1].split(",")[2].split()[0].startswith("%cst"), "it starts at zero"
    accumulator = product.split("=")[0].strip()
    assert any("arith.addf %acc0_" in line and f", {accumulator} :" in line for line in lines)


@pytest.mark.parametrize(("mode", "block_m"), [("rows", 64), ("swap", 16)])
def test_fp32_products_can_be_sums_of_three_products_of_the_matrix_instruction(mode: str, block_m: int) -> None:
    problem = residual_fp32(37)
    config = {**default(problem), "mode": mode, "block_m": block_m, "block_n": 64, "block_k": 32, "num_stages": 3}
    assert config["precision"] == "tf32x3"
    ptx = ptx_of(problem, plan_of(problem, config))
    assert ptx.count("wgmma.mma_async") == 3 * 32 // 8, "three for each 8 of K"
    assert "tf32" not in ptx_of(problem, plan_of(problem, {**config, "precision": "ieee"}))


def norm_product_fp32(n: int, products: int = 1) -> Problem:
    """A norm, and products that share it, as in Chronos-2."""
    text = (
        "t0 = pow(i1, 2); t1 = mean(t0); t2 = add(t1, 1e-06); t3 = rsqrt(t2); t4 = mul(i1, t3); t5 = mul(i0, t4); "
        "t6 = reshape(t5, [37, 768])"
    )
    for j in range(products):
        text += f"; t{7 + j} = t(i{2 + j}); o{j} = mm(t6, t{7 + j})"
    shapes = [(768,), (1, 37, 768), *[(n, 768)] * products]
    operands = tuple(TensorSpec.contiguous(shape, "float32") for shape in shapes)
    return Problem(op="generated", inputs=operands, device="cuda", scalars=(("program", text),))


@pytest.mark.parametrize(
    ("problem", "split_k", "programs"),
    [
        (norm_product_fp32(768, 3), 6, 216),
        (residual_fp32(37), 8, 96),
        (norm_product_fp32(3072), 4, 192),  # five parts of twelve tiles would leave one empty
        (norm_product_fp32(12288), 1, 192),
    ],
    ids=["q, k and v", "down", "up", "wide"],
)
def test_parts_of_k_fill_the_device_once(problem: Problem, split_k: int, programs: int) -> None:
    config = default(problem)
    (launch,) = plan_of(problem, config).launches
    assert (config["split_k"], launch.grid[0]) == (split_k, programs)
    _, shared = compiled(problem, plan_of(problem, config))
    assert shared * -(-programs // H200.num_units) <= H200.smem_bytes, "all of them run at once"


def sum_and_norm(m: int, n: int, k: int, dtype: str) -> Problem:
    """A product, what is added to it, and the layer norm of the sum, both results."""
    text = (
        "t0 = t(i1); t1 = mm(i0, t0); o0 = add(i2, t1); t2 = convert(o0, float32); t3 = var_mean(t2, 0); t4 = getitem(t3, 0); "
        "t5 = getitem(t3, 1); t6 = sub(t2, t5); t7 = add(t4, 1e-06); t8 = rsqrt(t7); t9 = mul(t6, t8); t10 = mul(t9, i3); "
        f"t11 = add(t10, i4); o1 = convert(t11, {dtype})"
    )
    operands = tuple(TensorSpec.contiguous(shape, dtype) for shape in ((m, k), (n, k), (m, n), (n,), (n,)))
    return Problem(op="generated", inputs=operands, device="cuda", scalars=(("program", text),))


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "instruction", "programs"),
    [
        (1970, 768, 768, "bfloat16", "m64n16k16.f32.bf16", 124),  # a ViT-Base's projection, ten images
        (1031, 768, 3072, "float32", "m16n8k8.row.col.f32.tf32", 65 * 2),  # Chronos-2's second layer, of batches
        (1024, 768, 768, "bfloat16", "m64n16k16.f32.bf16", 64 * 2),
        (2048, 1024, 1024, "bfloat16", "m64n16k16.f32.bf16", 128),
        (1088, 2048, 2048, "bfloat16", "m64n16k16.f32.bf16", 68),
        (8192, 40, 64, "bfloat16", "m64n16k16.f32.bf16", 512),
    ],
)
def test_whole_rows_lie_in_the_registers_of_a_program(
    m: int, n: int, k: int, dtype: str, instruction: str, programs: int, tmp_path: Path
) -> None:
    problem = sum_and_norm(m, n, k, dtype)
    config = default(problem)
    assert config["block_n"] == 1 << (n - 1).bit_length()
    (launch,) = plan_of(problem, config).launches
    assert launch.grid[0] == programs
    ptx = ptx_of(problem, plan_of(problem, config))
    assert instruction in ptx
    assert ("cp.async.cg.shared.global" in ptx) is (k > 64), "tiles are read ahead, if there are several"
    assert for_hopper.bytes_of_stack(ptx, tmp_path) <= 64, "16 numbers of a thread at most"


@pytest.mark.parametrize("m", [1, 64, 1023, 8193])
def test_whole_rows_are_tried_with_many_rows_alone(m: int) -> None:
    problem = sum_and_norm(m, 768, 768, "bfloat16")
    assert load_space("generated")["triton"].default(names_for(Generated().dims(problem), H200)) is None


@pytest.mark.parametrize(("m", "n", "dtype"), [(1970, 768, "bfloat16"), (1031, 768, "float32"), (1088, 2048, "bfloat16")])
def test_the_largest_blocks_of_whole_rows_have_registers(m: int, n: int, dtype: str) -> None:
    """A program of 16 warps has 128 registers a thread: the assembler refuses what cannot lie in them."""
    problem = sum_and_norm(m, n, 768, dtype)
    space = load_space("generated")["triton"].bind(names_for(Generated().dims(problem), H200))
    largest: dict[ConfigValue, dict[str, ConfigValue]] = {}  # by mode
    for config in space.enumerate():
        if config["num_warps"] == 16 and config["split_k"] == 1 and config.get("precision") != "ieee":
            sizes = [config[name] for name in ("block_m", "block_k", "num_stages")]
            known = largest.setdefault(config["mode"], config)
            if sizes >= [known[name] for name in ("block_m", "block_k", "num_stages")]:
                largest[config["mode"]] = config
    assert set(largest) == {"rows", "swap"}
    for config in largest.values():
        assert int(config["block_m"]) * int(config["block_n"]) == 32768
        assert "st.global" in ptx_of(problem, plan_of(problem, config)), config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_n": 512}, "whole rows of 768 columns .* block_n must be as many, in mode rows or swap; it is 512 in"),
        ({"mode": "vector", "block_m": 1}, "it is 1024 in mode vector"),
    ],
)
def test_a_program_without_whole_rows_is_refused(changes: dict[str, Any], said: str) -> None:
    problem = sum_and_norm(1, 768, 768, "bfloat16")
    config = {**default(sum_and_norm(1024, 768, 768, "bfloat16")), **changes}
    with pytest.raises(ValueError, match=said):
        plan_of(problem, config)
    space = load_space("generated")["triton"]
    assert space.violations(config, names_for(Generated().dims(problem), H200))


def scores(batch: int, m: int, n: int, k: int, softmax: bool) -> Problem:
    """Scaled scores of a batch with a mask, of matrices that are seen the other way round."""
    text = "t0 = bmm(i0, i1); t1 = mul(t0, 0.125); " + (
        "t2 = add(t1, i2); t3 = convert(t2, float32); t4 = amax(t3); t5 = sub(t3, t4); t6 = exp(t5); t7 = sum(t6); "
        "t8 = div(t6, t7); o0 = convert(t8, bfloat16)"
        if softmax
        else "o0 = add(t1, i2)"
    )
    keys = TensorSpec(shape=(batch, k, n), dtype="bfloat16", stride=(n * k, 1, k))
    operands = (spec(batch, m, k), keys, spec(batch, 1, n))
    return Problem(op="generated", inputs=operands, device="cuda", scalars=(("program", text),))


@pytest.mark.parametrize(
    ("m", "n", "softmax", "programs", "instruction"),
    [
        (197, 197, False, 12 * 4 * 4, "m64n64k16.f32.bf16"),
        (197, 197, True, 12 * 13, "m64n16k16.f32.bf16"),
        (512, 512, True, 12 * 32, "m64n16k16.f32.bf16"),
        (1, 512, False, 12 * 128, "fma.rn.f32"),
    ],
)
def test_batches_compile_for_hopper(m: int, n: int, softmax: bool, programs: int, instruction: str, tmp_path: Path) -> None:
    problem = scores(12, m, n, 64, softmax)
    config = default(problem)
    (launch,) = plan_of(problem, config).launches
    assert launch.grid == (programs, 1, 1)
    ptx = ptx_of(problem, plan_of(problem, config))
    assert instruction in ptx
    assert for_hopper.bytes_of_stack(ptx, tmp_path) == 0


def test_statistics_of_rows_are_read_ahead() -> None:
    problem = norm_product_fp32(768)
    config = default(problem)
    assert config["block_s"] == 128, "64 rows of it in registers"
    ptx = ptx_of(problem, plan_of(problem, config))
    loop = ptx.index("wgmma.mma_async")
    found = [at for at in range(len(ptx)) if ptx.startswith("cp.async.commit_group", at)]
    assert sum(at < loop for at in found) >= 2 + 1 + 3, "two tiles ahead, one in the loop, and those of the products"


def test_a_row_of_a_norm_is_read_once_and_in_full_width() -> None:
    problem = norm(16)
    ptx = ptx_of(problem, plan_of(problem, default(problem)))
    assert ".v4.b32" in ptx
    assert ptx.count("ld.global") <= 8 * 2, "the row and the weight, four lanes' worth of each at most"


def test_the_same_problem_and_config_are_the_same_file(tmp_path: Path) -> None:
    problem = norm(3)
    config = {**default(problem), "block_m": 2}  # in no other test
    first, second = (plan_of(problem, config).launches[0].kernel for _ in range(2))
    assert first is second
    (path,) = (tmp_path / "generated").glob("*.py")
    assert path.stem == first.__name__
    assert "def generated_" in path.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path / "file"))
    problem = norm(5)
    kernel = plan_of(problem, {**default(problem), "block_m": 2}).launches[0].kernel
    assert "def generated_" in Path(kernel.fn.__code__.co_filename).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_m": 12}, "block_m must be a power of two; it is 12"),
        ({"block_n": 8}, "tiles of matrix instructions are at least 16"),
        ({"mode": "vector"}, "mode vector is for one row and block_m of 1; there are 16 rows"),
        ({"precision": "tf32"}, "precision must be one of ieee, tf32x3; it is tf32"),
        ({"mode": "columns"}, "mode must be one of rows, swap, vector"),
        ({"split_k": 65}, "K has 64 blocks of 64; split_k is 65"),
        ({"group_m": 8}, "unknown: group_m"),
        ({"kernel": "generated_rows", "block_n": None}, "generated_rows is for programs without matrix products"),
        ({"kernel": "fast"}, "generated has no Triton kernel 'fast'; there are generated_mm, generated_rows"),
    ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], said: str) -> None:
    config = {**default(gated(16)), **changes}
    if config["kernel"] == "generated_rows":
        config = {**default(norm(16)), "kernel": "generated_rows"}
    with pytest.raises(ValueError, match=said):
        plan_of(gated(16), config)


def test_offsets_are_of_32_bits() -> None:
    wide = TensorSpec(shape=(3, 64), dtype="bfloat16", stride=(2**31, 1))
    problem = Problem(op="generated", inputs=(wide,), device="cuda", scalars=(("program", "t0 = sum(i0); o0 = mul(i0, t0)"),))
    with pytest.raises(ValueError, match="32-bit offsets"):
        plan_of(problem, default(problem))


@pytest.mark.parametrize(
    ("shape", "stride", "frame", "terms"),
    [
        ((4, 6, 8), (48, 8, 1), (4, 6), ["row * 8"]),
        ((4, 6, 8), (8, 32, 1), (4, 6), ["(row // 6) * 8", "(row % 6) * 32"]),
        ((4, 1, 8), (8, 8, 1), (4, 6), ["(row // 6) * 8"]),
        ((6, 8), (8, 1), (4, 6), ["(row % 6) * 8"]),
        ((1, 1, 8), (8, 8, 1), (4, 6), []),
        ((8,), (1,), (4, 6), []),
        ((2, 3, 5, 7), (105, 35, 7, 1), (2, 3, 5), ["row * 7"]),
        ((2, 3, 5, 7), (105, 7, 21, 1), (2, 3, 5), ["(row // 15) * 105", "(row // 5 % 3) * 7", "(row % 5) * 21"]),
    ],
)
def test_rows_are_found_wherever_they_lie(
    shape: tuple[int, ...], stride: tuple[int, ...], frame: tuple[int, ...], terms: list[str]
) -> None:
    found = row_terms(TensorSpec(shape=shape, dtype="float32", stride=stride), frame, "row")
    for row in range(2 * 3 * 5 if len(frame) == 3 else 24):
        wanted = sum(eval(term, {"row": row}) for term in terms)
        assert sum(eval(term, {"row": row}) for term in found) == wanted
    assert len(found) == len(terms)


def test_what_is_added_to_one_row_is_asked_for_before_the_threads_add_up() -> None:
    """Else its latency comes last, behind barriers."""
    text = "t0 = t(i2); t1 = mm(i1, t0); o0 = add(i0, t1)"
    operands = (spec(1, D), spec(1, D), spec(D, D))
    problem = Problem(op="generated", inputs=operands, device="cuda", scalars=(("program", text),))
    config = {
        **default(problem),
        "mode": "vector",
        "block_m": 1,
        "block_n": 1,
        "block_k": 2048,
        "num_warps": 8,
        "num_stages": 1,
    }
    ptx = ptx_of(problem, plan_of(problem, config))
    assert ptx.index("ld.global.b16") < ptx.index("bar.sync")
    assert ptx.index("ld.global.b16") < ptx.index("shfl.sync")
