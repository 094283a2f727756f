"""One kernel, compiled in this process to a shared object that needs nothing of the compiler.

CuTe DSL breaks with threads and takes its target from the environment: compile in child processes, one kernel at a time.
Neither torch nor a compiler is imported before something is compiled: looking into the cache takes no time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.cutedsl.config import CLUSTER, DTYPES, OPERATORS, QUACK, TENSOROP, multiplies
from autokernel.cutedsl.spec import BIAS, SQUARES, KernelSpec, Launch, ObjectInfo
from autokernel.errors import CompileError
from autokernel.ops.epilogue import FUNCTION_EPILOGUES, MATRIX_EPILOGUES, UNARY_EPILOGUES, scalar_step
from autokernel.requirements import declared_ranges, installed_version, out_of_range

if TYPE_CHECKING:
    import torch

_DSL, _OPERATORS, _QUACK, _FFI = "nvidia-cutlass-dsl", "nvidia-cutlass-operators", "quack-kernels", "apache-tvm-ffi"
_PACKAGES = (_DSL, _OPERATORS, _QUACK, _FFI)
_FUNCTION = "cute_gemm"
_SHIM = "launch_errors.c"
_RUNTIME = "libcuda_dialect_runtime_static.a"
_LINK_TIMEOUT_S = 120
_EXAMPLE = (512, 768, 1024)  # M, N, K of the matrices that stand for all sizes
_FUNCTIONS = (*UNARY_EPILOGUES, *FUNCTION_EPILOGUES)
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")
_WIDE_ROWS, _SHARED_COLUMNS = 192, 128  # quack shares wider tiles of so many rows out by columns
_ALLOWED = re.compile(r"(cuda[A-Z]|TVMFFI)\w*$|\w+@(@)?GLIBC_[0-9.]+$")


def unavailable() -> str | None:
    """Why nothing can be compiled here, with the cure; None if it can. Imports no compiler."""
    if installed_version("nvidia-cutlass") is not None:
        return (
            "the old package nvidia-cutlass is installed, which has a module `cutlass` of its own: "
            f"pip uninstall nvidia-cutlass, then {_cure()} --force-reinstall"
        )
    ranges = declared_ranges()
    for name in _PACKAGES:
        version = installed_version(name)
        if version is None:
            return f"{name} is not installed: {_cure()}"
        if (wrong := out_of_range(version, ranges.get(name, ""))) is not None:
            return f"{name} {version} is {wrong} (tested: {ranges[name]}): {_cure()}"
    if _static_runtime() is None:
        return f"{_DSL} has no {_RUNTIME} for CUDA {cuda_major()}: pip install 'nvidia-cutlass-dsl[cu{cuda_major()}]'"
    if _linker() is None:
        return "there is no C compiler to link kernels with: apt-get install gcc, or set CC"
    return None


def _cure() -> str:
    """What installs all packages in the versions that were tested: the extra `cutedsl`, spelled out."""
    ranges = declared_ranges()
    extras = {_DSL: f"[cu{cuda_major()}]"}
    return "pip install " + " ".join(f"'{name}{extras.get(name, '')}{ranges.get(name, '')}'" for name in _PACKAGES)


def versions() -> dict[str, str]:
    """What besides a spec decides a shared object, for its key: compilers, the CUDA that it calls, the processor."""
    found = {name: installed_version(name) or "" for name in _PACKAGES}
    return {**found, "cuda": str(cuda_major()), "machine": platform.machine()}


def cuda_major() -> int:
    """Of the CUDA runtime that objects call: torch's; with a CPU build of torch, the newest that can be linked."""
    if (cuda := _cuda_of_torch()) is not None:
        return int(cuda.split(".")[0])
    return 13 if installed_version("nvidia-cutlass-dsl-libs-cu13") is not None else 12


@functools.cache
def _cuda_of_torch() -> str | None:
    """`torch.version.cuda`. Its file needs nothing of torch, which takes a second to import."""
    found = importlib.util.find_spec("torch")
    folders = found.submodule_search_locations if found is not None else None
    cuda = runpy.run_path(str(Path(folders[0]) / "version.py")).get("cuda") if folders else None
    return None if cuda is None else str(cuda)


def refusal(spec: KernelSpec) -> str | None:
    """The rule that a spec breaks, as far as that can be known without compiling; None if it breaks none."""
    try:
        config = spec.cute
    except ValueError as error:
        return str(error)
    if re.fullmatch(r"sm_(90|100)a", spec.arch) is None:
        return f"there are kernels for sm_90a and sm_100a, not {spec.arch}"
    if not multiplies(*spec.dtypes):
        given = " and ".join(dict.fromkeys(spec.dtypes))
        return f"CuTe DSL kernels take {', '.join(DTYPES)}, and both kinds of 8-bit floating point together, not {given}"
    if spec.dtype in _EIGHT_BITS and (spec.a_major, spec.b_major) != ("k", "k"):
        return f"8-bit operands must be contiguous along K: A is {spec.a_major}-major, B {spec.b_major}-major"
    if config.fast_accum and not spec.dtype.startswith("float8"):
        return f"fast_accum is for products in 8-bit floating point, not for {spec.dtype}: leave it off"
    if spec.pdl and config.source != QUACK:
        return f"{config.source} has no programmatic dependent launch, quack has: leave pdl off"
    if spec.num_parts and (spec.epilogue or spec.batched or spec.out_dtype != "float32" or spec.arch != "sm_90a"):
        return "separate makes float32 parts of one product on sm_90a, without an epilogue: leave it off"
    if spec.gated and (reason := _gated_refusal(spec)) is not None:
        return reason
    if spec.squares and (reason := _squares_refusal(spec)) is not None:
        return reason
    known = (*spec.operands().values(), *_FUNCTIONS, SQUARES, *(spec.epilogue if spec.gated else ()))
    if unknown := [name for name in spec.epilogue if name not in known and scalar_step(name) is None]:
        names = ", ".join((BIAS, *_FUNCTIONS, *MATRIX_EPILOGUES))
        return f"an epilogue is made of scales, steps with numbers, rows or columns, and {names}, not {', '.join(unknown)}"
    if config.source == OPERATORS:
        outputs: tuple[str, ...] = ("int32", "float32", "int8") if spec.dtype == "int8" else (*DTYPES[:4], "float32")
        if config.family == TENSOROP:
            outputs = ("bfloat16", "float16", "float32")
            if spec.dtype in _EIGHT_BITS:
                return f"operators' family {TENSOROP} multiplies matrices of 16 bits, not {spec.dtype}: leave family out"
        if spec.epilogue:
            return f"operators computes no epilogue, spec has {', '.join(spec.epilogue)}: use quack, or leave it to the graph"
        if len(set(spec.dtypes)) > 1:
            return f"operators multiplies matrices of one dtype, not {' and '.join(spec.dtypes)}: use quack"
    else:
        outputs = ("bfloat16", "float16", "float32")
        if config.source == CLUSTER and (reason := _cluster_refusal(spec)) is not None:
            return reason
        if spec.dtype == "int8":
            return "quack takes no int8: use operators"
        along_k = (spec.a_major if config.swap else spec.b_major) == "k"
        if config.tile_m == _WIDE_ROWS and config.tile_n > _SHARED_COLUMNS and not along_k:
            tile = f"{config.tile_m}x{config.tile_n}"
            return f"quack's compiler ends its process for tiles of {tile} whose columns are not contiguous along K"
    if spec.out_dtype not in outputs:
        return f"{config.source} makes {', '.join(outputs)} of {spec.dtype}, not {spec.out_dtype}"
    return None


def _gated_refusal(spec: KernelSpec) -> str | None:
    """Rules of quack's kernels whose result has half the columns."""
    config, name = spec.cute, spec.epilogue[0]
    if config.source == OPERATORS or len(spec.epilogue) > 1:
        return f"{name} is computed by quack alone, and with nothing before or behind it"
    if config.swap or config.split_k > 1 or config.tile_n % 32 != 0:
        return f"{name} takes tiles of a multiple of 32 columns, without swap and split_k"
    if spec.b_major != "k":  # else quack would take every other row of B for a half of it, and say nothing
        return f"{name} takes a B that is contiguous along K"
    if spec.out_dtype not in ("bfloat16", "float16"):
        return f"{name} makes bfloat16 or float16, not {spec.out_dtype}"
    return None


def _squares_refusal(spec: KernelSpec) -> str | None:
    """Rules of quack's kernels with a second result."""
    config = spec.cute
    if config.source == OPERATORS or spec.epilogue.index(SQUARES) != len(spec.epilogue) - 1:
        return f"{SQUARES} are summed by quack alone, behind all other steps"
    if config.split_k > 1 or spec.batched or spec.arch != "sm_90a":
        return f"{SQUARES} are summed for one product on sm_90a, without split_k: a part of K has no squares of the whole"
    return None


def _cluster_refusal(spec: KernelSpec) -> str | None:
    """Rules of our own kernel."""
    if spec.dtype in _EIGHT_BITS or (spec.a_major, spec.b_major) != ("k", "k"):
        given = f"{spec.dtype}, A {spec.a_major}-major, B {spec.b_major}-major"
        return f"cluster multiplies matrices of 16 bits that are contiguous along K, not {given}: use quack or operators"
    if spec.epilogue or spec.batched or spec.arch != "sm_90a":
        return "cluster computes one product on sm_90a, without an epilogue: use quack, or leave the epilogue to the graph"
    return None


def compile_kernel(spec: KernelSpec) -> tuple[ObjectInfo, bytes]:
    """Compile and link one kernel.

    Returns:
        What is known of it, and the shared object.

    Raises:
        CompileError: the packages are missing, the spec is refused, or compiling or linking failed.
    """
    if (reason := unavailable()) is not None:
        raise CompileError(f"CuTe DSL kernels cannot be compiled: {reason}")
    if (reason := refusal(spec)) is not None:
        raise CompileError(f"no such CuTe DSL kernel: {reason}")
    started = time.monotonic()
    with environment(spec.arch, spec.num_units), tempfile.TemporaryDirectory(prefix="autokernel-cute-") as folder:
        compiled, launch = _compiled(spec)
        content = link(compiled, launch.function, Path(folder))
    found = versions()
    info = ObjectInfo(
        key=spec.key(found),
        spec=spec,
        launch=launch,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        machine=platform.machine(),
        cuda_major=cuda_major(),
        versions=found,
        compile_s=time.monotonic() - started,
    )
    return info, content


def _compiled(spec: KernelSpec) -> tuple[Any, Launch]:
    from cutlass.base_dsl.common import DSLBaseError

    if spec.cute.source == OPERATORS:
        from autokernel.cutedsl.operators import compile_spec
    elif spec.cute.source == CLUSTER:
        from autokernel.cutedsl.own import compile_spec
    else:
        from autokernel.cutedsl.quack import compile_spec
    try:
        return compile_spec(spec, example(spec), _FUNCTION)
    except (DSLBaseError, ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        # whatever the sources refuse shows as one of these, from deep inside of their tracing
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"{spec.cute.source} did not compile {dict(spec.config)}: {lines[0]}") from error


def example(spec: KernelSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and the result as a spec has them, of some size, on the CPU."""
    import torch

    m, n, k = _EXAMPLE
    lead = (2,) if spec.batched else ()
    a_dtype, b_dtype, out_dtype = (getattr(torch, name) for name in (*spec.dtypes, spec.out_dtype))
    a = torch.empty((*lead, m, k) if spec.a_major == "k" else (*lead, k, m), dtype=a_dtype)
    b = torch.empty((*lead, k, n) if spec.b_major == "n" else (*lead, n, k), dtype=b_dtype)
    out = torch.empty((*lead, m, spec.num_columns(n)), dtype=out_dtype)
    return a if spec.a_major == "k" else a.mT, b if spec.b_major == "n" else b.mT, out


@contextlib.contextmanager
def environment(arch: str, num_units: int) -> Iterator[None]:
    """Make CuTe DSL and quack compile for an architecture, with a GPU or without.

    Args:
        arch: "sm_90a" or "sm_100a".
        num_units: multiprocessors to count with where no such GPU can be asked how many clusters run at once.
    """
    import torch

    os.environ.update(CUTE_DSL_ARCH=arch, QUACK_ARCH=arch[3:-1], QUACK_CACHE_ENABLED="0")
    with contextlib.ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        # of each other, which nobody can do anything about here
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(quack|cutlass)(\.|$)")
        from cutlass.cutlass_dsl import CuTeDSL
        from cutlass.utils import HardwareInfo
        from quack import cute_dsl_utils

        # both remember the architecture that they were first used for
        CuTeDSL._get_dsl().envar.arch = arch
        cute_dsl_utils._get_device_capacity_cached.cache_clear()
        cute_dsl_utils.get_compile_target_capacity.cache_clear()
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == (int(arch[3:-2]), int(arch[-2])):
            torch.cuda.current_stream().synchronize()  # the query wants a context
        else:
            forget = cute_dsl_utils.get_max_active_clusters.cache_clear
            forget()
            undo.callback(forget)
            for name, replacement in (
                ("__init__", lambda self, device_id=0: None),
                ("get_max_active_clusters", lambda self, cluster_size, stream=None: num_units // cluster_size),
                ("get_device_multiprocessor_count", lambda self: num_units),
            ):
                undo.callback(setattr, HardwareInfo, name, getattr(HardwareInfo, name))
                setattr(HardwareInfo, name, replacement)
        yield


def link(compiled: Any, function: str, folder: Path) -> bytes:
    """A compiled kernel as a shared object that needs tvm_ffi and the CUDA runtime only.

    Raises:
        CompileError: the linker failed, or the object needs more than that.
    """
    runtime, linker = _static_runtime(), _linker()
    if runtime is None or linker is None:
        raise CompileError(f"CuTe DSL kernels cannot be linked: {unavailable()}")
    import tvm_ffi

    object_file, shim, result = folder / "kernel.o", folder / _SHIM, folder / "kernel.so"
    compiled.export_to_c(str(object_file), function_name=function)
    shim.write_bytes(resources.files("autokernel.cutedsl").joinpath(_SHIM).read_bytes())
    ffi = Path(tvm_ffi.__file__).parent / "lib"
    # lazily bound: the CUDA runtime is found where the first launch happens; nothing but the kernel's entry is to be seen
    flags = ["-O1", "-fPIC", "-shared", "-s", "-Wl,-z,lazy", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL"]
    _run([linker, *flags, "-o", str(result), str(object_file), str(shim), str(runtime), f"-L{ffi}", "-ltvm_ffi"])
    listed = _run(["nm", "-D", "--undefined-only", str(result)])
    words = [line.split() for line in listed.splitlines() if line.strip()]
    needless = sorted(parts[-1] for parts in words if parts[0] == "U" and not _ALLOWED.match(parts[-1]))
    if needless:
        raise CompileError(
            f"a compiled kernel may need only the CUDA runtime, tvm_ffi and libc, this one needs {', '.join(needless)}: "
            f"{_RUNTIME} of {_DSL} {installed_version(_DSL)} has changed; {_cure()}"
        )
    return result.read_bytes()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LINK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]} did not run: {error}; install gcc and binutils") from error
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _linker() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "cc")))), None)


def _static_runtime() -> Path | None:
    """NVIDIA's static library for the CUDA that objects call, found without importing the package."""
    try:
        distribution = metadata.distribution(f"nvidia-cutlass-dsl-libs-cu{cuda_major()}")
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"nvidia_cutlass_dsl/cu{cuda_major()}/lib/{_RUNTIME}")))
    return path if path.is_file() else None
