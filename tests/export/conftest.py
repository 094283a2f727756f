"""What tests of exported code share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def static_gxx(tmp_path: Path) -> str:
    """g++ as on an image that has libstdc++.a and no libstdc++.so."""
    archive = Path(subprocess.check_output(["g++", "-print-file-name=libstdc++.a"], text=True).strip())
    if not archive.is_file():
        pytest.skip("there is no libstdc++.a")
    only = tmp_path / "only"
    only.mkdir()
    (only / "libstdc++.a").symlink_to(archive)
    fake = tmp_path / "g++"
    fake.write_text(
        '#!/bin/sh\ncase " $* " in\n'
        f'  *" -shared "*) exec g++ -nodefaultlibs "$@" -L{only} -lstdc++ -lm -lgcc_s -lgcc -lc ;;\n'
        'esac\nexec g++ "$@"\n'
    )
    fake.chmod(0o755)
    return str(fake)
