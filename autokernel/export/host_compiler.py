"""Which libstdc++ the host code of a package is linked with: the shared one, like torch.

A library that holds a copy of libstdc++ cannot live beside torch's: each copy numbers the facets of a locale for itself, so
that the first regular expression in the package finds another facet in the place of its own, and the process ends with
std::bad_cast or a segmentation fault. g++ puts the static copy into a library, and says nothing, where it finds no link named
`libstdc++.so`; some images have none. Torch has loaded the shared library already, so that the compiler can be shown it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_NAME = "libstdc++.so"
_TIMEOUT_S = 60
_SOURCE = '#include <iostream>\nvoid said() { std::cout << "linked"; }\n'
_WRAPPER = """#!/bin/sh
case " $* " in *" -shared "*) exec {compiler} -L{folder} "$@" ;; esac
exec {compiler} "$@"
"""


@contextlib.contextmanager
def shared_libstdcxx(compiler: str) -> Iterator[str | None]:
    """A compiler to use instead of this one, as long as the context is open; None if this one links the shared library.

    Args:
        compiler: g++ or clang++, a name or a path.
    """
    with tempfile.TemporaryDirectory(prefix="autokernel-cxx-") as name:
        folder = Path(name)
        loaded = _loaded()
        if loaded is None or _links_shared(compiler, folder) is not False:
            yield None
            return
        (folder / _NAME).symlink_to(loaded)
        wrapper = folder / f"shared-{Path(compiler).name}"  # torch tells compilers by their names
        wrapper.write_text(_WRAPPER.format(compiler=shlex.quote(compiler), folder=shlex.quote(name)))
        wrapper.chmod(0o755)
        if not _links_shared(str(wrapper), folder):
            log.warning(
                "autokernel: %s links libstdc++ statically, and a process that loads such a package ends: install the link %s "
                "of the compiler's version (Debian, Ubuntu: libstdc++-dev)", compiler, _NAME,
            )  # fmt: skip
            yield None
            return
        log.info("autokernel: %s finds no shared libstdc++: it is shown %s", compiler, loaded)
        yield str(wrapper)


def _links_shared(compiler: str, folder: Path) -> bool | None:
    """Whether what it links asks for the shared library; None for a compiler that fails: torch says what is wrong with it."""
    source, built = folder / "linked.cpp", folder / "linked.so"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", "-o", str(built), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return _NAME.encode() in built.read_bytes()  # the name of a library that it needs


def _loaded() -> str | None:
    """The file of the libstdc++ in this process; None where that is not known, as on all but Linux."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith(_NAME) and os.path.isfile(path):
                return path
    return None
