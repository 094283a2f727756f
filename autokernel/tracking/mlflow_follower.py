"""The child process that keeps MLflow up to date: `python -m autokernel.tracking.mlflow_follower`.

It follows the journal file, so nothing waits for it and nothing is lost with it. The first line of its standard input is
`{"folder": ..., "tracking_uri": ...}`; the end of standard input says that the run is over, or that its driver is gone.
On standard output it says, one JSON line each: where it writes, what keeps it from writing, and that it is done.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from autokernel.tracking.journal import JOURNAL_NAME, Entry, parse_line
from autokernel.tracking.mlflow_env import prepare_environment, scrubbed

logger = logging.getLogger("autokernel.tracking.mlflow_follower")

_POLL_S = 1.0  # metrics of that long travel in one batch
_SAY_EVERY_S = 2.0
_LONGEST_PAUSE_S = 60.0
NOT_MIRRORED = 3  # exit code: the journal has what MLflow has not


class Tail:
    """The whole lines of a growing journal, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._number = 0

    def new(self) -> Iterator[Entry]:
        """What was appended since the last call; a line without its end waits for the next."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as f:
            f.seek(self._offset)
            for line in f:
                if not line.endswith(b"\n"):
                    return
                self._number += 1
                entry = parse_line(line, self._path, self._number)
                self._offset += len(line)
                yield entry


def follow(folder: Path, tracking_uri: str) -> int:
    """Mirror until standard input ends and the journal is through.

    Returns:
        The exit code: 0, or NOT_MIRRORED.
    """
    prepare_environment()
    pause_s, problem, ended = _POLL_S, "", False
    while True:
        # Never wait again once the driver is gone: one last attempt, then the journal keeps what is missing.
        try:
            writer, tail = _connect(folder, tracking_uri)
            while True:
                _catch_up(writer, tail)
                if problem:
                    problem = ""
                    _say(recovered=True)
                if ended:
                    writer.settle()
                    _say(done=True)
                    return 0
                pause_s, ended = _POLL_S, _stdin_ended(_POLL_S)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            logger.log(logging.DEBUG if problem else logging.WARNING, "not mirrored: %s", text, exc_info=not problem)
            if not problem:
                _say(problem=scrubbed(text, tracking_uri))
            problem = text
            if ended:
                return NOT_MIRRORED
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            ended = _stdin_ended(pause_s)


class _Scrubbing(logging.Formatter):
    """Tracebacks of failed requests quote the URI; the log must not keep its password."""

    def __init__(self, tracking_uri: str) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")
        self._uri = tracking_uri

    def format(self, record: logging.LogRecord) -> str:
        return scrubbed(super().format(record), self._uri)


def _connect(folder: Path, tracking_uri: str) -> tuple[Any, Tail]:
    from autokernel.tracking.mlflow_writer import MlflowWriter

    return MlflowWriter(tracking_uri, folder), Tail(folder / JOURNAL_NAME)


def _catch_up(writer: Any, tail: Tail) -> None:
    said_s = time.monotonic()
    known = bool(writer.experiment_id)
    count = 0
    for entry in tail.new():
        writer.take(entry)
        count += 1
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            _say(events=count)
    if count:
        writer.flush()
    if writer.experiment_id and not known:
        _say(experiment_id=writer.experiment_id)


def _stdin_ended(timeout_s: float) -> bool:
    ready, _, _ = select.select([0], [], [], timeout_s)
    return bool(ready) and os.read(0, 4096) == b""


def _say(**fields: object) -> None:
    with suppress(OSError):  # a driver that was killed does not listen
        os.write(1, json.dumps(fields).encode() + b"\n")


def _read_line() -> bytes:
    """The first line, byte by byte: a buffered reader would swallow the end that `select` waits for."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line


def main() -> int:
    """Entry point of the child."""
    spec = json.loads(_read_line())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Scrubbing(spec["tracking_uri"]))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    with suppress(OSError):
        os.nice(10)  # on a CPU, what is being timed comes first
    return follow(Path(spec["folder"]), spec["tracking_uri"])


if __name__ == "__main__":
    sys.exit(main())
