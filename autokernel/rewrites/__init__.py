"""Other ways to write an op in plain torch, one file per op. A rewriting is traced into the graph, where Inductor compiles it.

To add one: a function of the op's file, in its table. `export/regions.py` puts it in the place of the op's regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.rewrites.attention import ATTENTION
from autokernel.rewrites.gated import GATED
from autokernel.rewrites.rotary import ROTARY
from autokernel.rewrites.rotary_complex import ROTARY_COMPLEX

if TYPE_CHECKING:
    import torch

    from autokernel.records import Problem

# (problem, inputs in its order) -> outputs in the order of the op's reference; plain torch, free of side effects
Rewrite = Callable[..., "tuple[torch.Tensor, ...]"]

REWRITES: Mapping[str, Mapping[str, Rewrite]] = {
    "attention": ATTENTION,
    "gated": GATED,
    "rotary": ROTARY,
    "rotary_complex": ROTARY_COMPLEX,
}
STOCK = "stock"  # the name of the graph's own way


def find_rewrite(op: str, name: str) -> Rewrite:
    """The rewriting of an op.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    known = REWRITES.get(op, {})
    if name not in known:
        raise ValueError(f"{op} has no implementation {name!r}; there are {', '.join((STOCK, *known))}")
    return known[name]


__all__ = ["REWRITES", "STOCK", "Problem", "Rewrite", "find_rewrite"]
