"""No room on a device that workers share is nobody's fault: the job is lost, and its candidate not refused for ever."""

from __future__ import annotations

# As libraries say it that raise no OutOfMemoryError, and as it reads in what Inductor raises in its place.
_TROUBLE = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# A kernel that wants more shared memory than there is, on any device: Inductor's launcher calls that out of memory, too.
_OWN_FAULT = "out of resource"


def raise_if_full(error: BaseException) -> None:
    """Tell a device without room for now from a candidate that does not build or run.

    Compilers wrap what stopped them, as a cause, as an attribute (`torch.compile`) or as text alone (Inductor's lowerings).

    Raises:
        torch.OutOfMemoryError: the device's memory is the reason.
    """
    import torch

    link: BaseException | None = error
    while link is not None:
        lines = str(link).splitlines()
        line = next((line for line in lines if any(words in line for words in _TROUBLE)), None)
        if line is None and isinstance(link, torch.OutOfMemoryError) and _OWN_FAULT not in str(link):
            line = lines[0] if lines else "no memory is left"
        if line is not None:
            raise torch.OutOfMemoryError(line) from error
        link = getattr(link, "inner_exception", None) or link.__cause__ or link.__context__
