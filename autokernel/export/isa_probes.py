"""Looking at the processor while graphs are still being rewritten.

Before its first C++ kernel, Inductor builds a small program for each set of vector instructions, one after the other: about
five seconds on a machine that has not compiled before, with every other core idle. The programs are files under names that
tell their content, so a thread can build them from the moment that a compilation starts. Inductor finds them and judges by
them as ever.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Iterator

from torch._inductor import codecache, config, cpp_builder, cpu_vec_isa
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._filelock import FileLock


@contextlib.contextmanager
def built_ahead() -> Iterator[None]:
    """For a compilation on a CPU. Does nothing where Inductor has its answer, or built something here before."""
    answered = getattr(cpu_vec_isa.valid_vec_isa_list, "cache_info", None)
    if answered is None or answered().currsize or config.cpp.vec_isa_ok is not None or os.listdir(cache_dir()):
        yield
        return
    ended = threading.Event()
    context = contextvars.copy_context()  # Inductor's options for this compilation: they are part of the names
    threading.Thread(target=context.run, args=(_build, ended), name="autokernel-isa-probes", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _build(ended: threading.Event) -> None:
    """Build the first program for each set of instructions that the processor names, in Inductor's order."""
    # another version of Inductor, a folder that is gone, a compiler that does not know the instructions
    with contextlib.suppress(AttributeError, TypeError, OSError, CppCompileError):
        flags = cpu_vec_isa.x86_isa_checker()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            if ended.is_set():
                return
            if all(flag in flags for flag in str(isa).split()):
                _build_one(type(isa)())  # Inductor's own instances change their flags while they look


def _build_one(isa: cpu_vec_isa.VecISA) -> None:
    """The building half of Inductor's `VecISA.check_build`; the other half, loading it in a process of its own, is its own."""
    flags = cpu_vec_isa._get_isa_dry_compile_fingerprint(isa.build_arch_flags())
    key, source = codecache.write(cpu_vec_isa.VecISA._avx_code, "cpp", extra=flags)
    with FileLock(os.path.join(codecache.get_lock_dir(), f"{key}.lock"), timeout=codecache.LOCK_TIMEOUT):
        options = cpp_builder.CppTorchOptions(vec_isa=isa, warning_all=False)
        builder = cpp_builder.CppBuilder(key, [source], options, os.path.dirname(source))
        if not os.path.isfile(builder.get_target_file_path()):
            builder.build()
