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

from torch._inductor import config, cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir


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
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another version of Inductor, or a folder that is gone
        flags = cpu_vec_isa.x86_isa_checker()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            if ended.is_set():
                return
            if all(flag in flags for flag in str(isa).split()):
                # by an instance of our own, for Inductor's change their flags while they look
                type(isa)().check_build(cpu_vec_isa.VecISA._avx_code)
