"""Memory that is asked for before it is needed."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def prefetch(at):
    """Bring what lies at these addresses (pointers to elements) to the L2 cache, in lines of 128 bytes. Nothing is read.

    All writes go through that cache, so what is written there later is seen by whoever loads it then.
    """
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
