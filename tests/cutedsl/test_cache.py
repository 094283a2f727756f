"""Compiled kernels on disk: whole or not there, compiled once by many processes, never more than a bound."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autokernel.cutedsl import cache as cache_module
from autokernel.cutedsl.cache import ObjectCache, default_folder
from autokernel.cutedsl.spec import KernelSpec, Launch, ObjectInfo
from autokernel.errors import StorageError

pytestmark = pytest.mark.clock

CONFIG = {"source": "operators", "tile_m": 128, "tile_n": 128}
SPEC = KernelSpec(config=CONFIG, dtype="bfloat16", out_dtype="bfloat16", a_major="k", b_major="k")
# a compiler that takes its time and leaves a line for each kernel
SLOW = """
import hashlib, json, sys, time
from pathlib import Path
from autokernel.cutedsl import compiler
from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.spec import KernelSpec, Launch, ObjectInfo

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
spec = KernelSpec.from_json(json.loads(sys.argv[3]))

def compile_kernel(spec):
    with (folder.parent / "compiled").open("a") as file:
        file.write("once\\n")
    print("compiling", flush=True)
    time.sleep(seconds)
    content = b"machine code"
    info = ObjectInfo(
        key=spec.key(compiler.versions()), spec=spec, launch=Launch(function="f", arguments=("a",)),
        sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content), machine="x86_64", cuda_major=13,
    )
    return info, content

compiler.compile_kernel = compile_kernel
info, path = ObjectCache(folder).get_or_compile(spec)
assert path.read_bytes() == b"machine code"
"""


def info_of(content: bytes, key: str = "0" * 32) -> ObjectInfo:
    return ObjectInfo(
        key=key,
        spec=SPEC,
        launch=Launch(function="cute_gemm", arguments=("a", "b", "out", None, ["operand0", None], [66, None], "stream")),
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        machine="x86_64",
        cuda_major=13,
        versions={"nvidia-cutlass-dsl": "4.8.1"},
        compile_s=1.5,
    )


def put(cache: ObjectCache, number: int, num_bytes: int = 1000, age_s: float = 0.0) -> str:
    key = f"{number:032x}"
    path = cache.put(info_of(bytes([number]) * num_bytes, key), bytes([number]) * num_bytes)
    moment = time.time() - age_s
    os.utime(path, (moment, moment))
    return key


def compile_slowly(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(folder), str(seconds), json.dumps(SPEC.to_json())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "new")
    assert cache.get("0" * 32) is None
    path = cache.put(info_of(b"code"), b"code")
    found = cache.get("0" * 32)
    assert found == (info_of(b"code"), path)
    assert path.read_bytes() == b"code"
    assert json.loads(path.with_suffix(".json").read_text())["key"] == "0" * 32, "where objects.load looks for it"


@pytest.mark.parametrize("damage", ["object", "record", "no object", "no record", "another's record"])
def test_a_damaged_object_is_dropped(tmp_path: Path, damage: str) -> None:
    cache = ObjectCache(tmp_path)
    path = cache.put(info_of(b"code"), b"code")
    record = path.with_suffix(".json")
    if damage == "object":
        path.write_bytes(b"c0de")
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    elif damage == "another's record":
        record.write_text(json.dumps(info_of(b"code", "1" * 32).to_json()))
    else:
        (path if damage == "no object" else record).unlink()
    assert cache.get("0" * 32) is None
    assert not path.exists()
    assert not record.exists()


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path)
    keys = [put(cache, number, age_s=100 - number) for number in range(4)]
    each = cache.statistics().num_bytes // 4
    assert cache.get(keys[0]) is not None  # so that it is the last used
    small = ObjectCache(tmp_path, max_bytes=3 * each + each // 2)
    put(small, 9)
    assert [small.get(key) is not None for key in keys] == [True, False, False, True]
    assert small.statistics().num_bytes <= small.max_bytes


def test_one_that_is_larger_than_the_bound_is_kept_until_the_next(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, max_bytes=10)
    first = put(cache, 1)
    assert cache.get(first) is not None
    second = put(cache, 2)
    assert (cache.get(first), cache.get(second) is not None) == (None, True)


def test_clearing_leaves_what_was_used_since(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path)
    old, new = put(cache, 1, age_s=3 * 86400), put(cache, 2)
    leftover = tmp_path / ".abc.tmp"
    leftover.write_bytes(b"half an object")
    os.utime(leftover, (0, 0))
    count, num_bytes = cache.clear(unused_for_s=2 * 86400)
    assert count == 1
    assert num_bytes > 1000
    assert (cache.get(old), cache.get(new) is not None, leftover.exists()) == (None, True, False)
    assert cache.clear()[0] == 1
    assert cache.statistics().num_objects == 0


def test_statistics(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, max_bytes=10**6)
    assert cache.statistics().oldest is None
    put(cache, 1, age_s=50)
    put(cache, 2)
    found = cache.statistics()
    assert (found.num_objects, found.kinds, found.max_bytes) == (2, {"operators sm_90a": 2}, 10**6)
    assert found.oldest is not None
    assert found.newest is not None
    assert 49 < found.newest - found.oldest < 60


def test_one_process_compiles_and_the_others_wait(tmp_path: Path) -> None:
    processes = [compile_slowly(tmp_path / "cache", 1.0) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert (tmp_path / "compiled").read_text().splitlines() == ["once"]


def test_a_process_that_dies_frees_its_lock(tmp_path: Path) -> None:
    killed = compile_slowly(tmp_path / "cache", 600)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "compiling\n"
    killed.send_signal(signal.SIGKILL)
    assert compile_slowly(tmp_path / "cache", 0).wait(timeout=60) == 0
    killed.wait()


def test_a_lock_held_for_too_long_is_an_error_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LOCK_TIMEOUT_S", 0.1)
    cache = ObjectCache(tmp_path)
    with cache._locked("0" * 32), pytest.raises(StorageError, match="it compiles, or hangs; stop it"):
        cache.put(info_of(b"code"), b"code")


def test_a_folder_that_cannot_be_written_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="AUTOKERNEL_CACHE_DIR"):
        ObjectCache(tmp_path / "file").put(info_of(b"code"), b"code")


def write_many(folder: str) -> None:
    cache = ObjectCache(Path(folder), max_bytes=20_000)
    for number in range(40):
        put(cache, number % 8)
        found = cache.get(f"{number % 8:032x}")
        assert found is None or found[1].name == found[0].file_name


def test_many_writers_share_a_small_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(str(tmp_path),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    cache = ObjectCache(tmp_path)
    assert cache.statistics().num_objects == sum(cache.get(f"{number:032x}") is not None for number in range(8))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_warm_cache_needs_no_compiler(tmp_path: Path) -> None:
    assert compile_slowly(tmp_path / "cache", 0).wait(timeout=60) == 0
    code = (
        "import sys\nfrom pathlib import Path\nfrom autokernel.cutedsl.cache import ObjectCache\n"
        "from autokernel.cutedsl.spec import KernelSpec\n"
        f"ObjectCache(Path({str(tmp_path / 'cache')!r})).get_or_compile(KernelSpec.from_json({SPEC.to_json()!r}))\n"
        "assert not {'cutlass', 'quack', 'tvm_ffi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "compiled").read_text().splitlines() == ["once"]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named" / "cutedsl"
    monkeypatch.delenv("AUTOKERNEL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "autokernel" / "cutedsl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "autokernel" / "cutedsl"
