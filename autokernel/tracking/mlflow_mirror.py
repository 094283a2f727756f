"""The Recorder that has MLflow follow the journal. It never raises into the run and never makes it wait."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import autokernel
from autokernel.events import Event
from autokernel.tracking.mlflow_env import QUIET, default_tracking_uri, redacted

logger = logging.getLogger(__name__)

_LOG_NAME = "mlflow.log"


class MlflowMirror:
    """Keeps a child process that mirrors `<run folder>/journal.jsonl` into MLflow while the run goes on.

    A child process and not a thread: importing MLflow and its 20 ms of Python per trial would hold the driver's
    interpreter lock, and a low priority can be given to a process only. Put it behind the Journal in the list of
    recorders, since it mirrors what the journal has.

    Args:
        run_folder: where the journal is; the child's log goes there too (`mlflow.log`).
        tracking_uri: any that MLflow knows; default: SQLite in the folder of runs.
        patience_s: how long `close` waits for a child that shows no progress.
    """

    def __init__(self, run_folder: Path | str, tracking_uri: str | None = None, patience_s: float = 60.0) -> None:
        self.run_folder = Path(run_folder).resolve()
        self.tracking_uri = tracking_uri or default_tracking_uri(self.run_folder.parent.parent)
        self.experiment_id: str | None = None  # MLflow's, once it is known
        self.complete: bool | None = None  # after `close`: whether MLflow has everything
        self.patience_s = patience_s
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._warned = False

    def record(self, event: Event) -> None:
        """Start the child at the first event; otherwise only look whether it has something to say. Never raises."""
        del event  # the child reads it from the journal
        if self._child is None and self.complete is None:
            self._start()
        self._listen()

    def close(self) -> None:
        """Let the child finish, as long as it gets on. Idempotent, never raises."""
        child = self._child
        if child is None or self.complete is not None:
            return
        assert child.stdin is not None
        try:
            child.stdin.close()
        except OSError as error:
            logger.debug("the MLflow mirror is gone already: %s", error)
        deadline = time.monotonic() + self.patience_s
        while child.poll() is None and time.monotonic() < deadline:
            if self._listen():
                deadline = time.monotonic() + self.patience_s
            time.sleep(0.02)
        if child.poll() is None:
            child.kill()
            child.wait()
        self._listen()
        assert child.stdout is not None
        child.stdout.close()
        self.complete = child.returncode == 0
        if not self.complete:
            logger.warning(
                "MLflow (%s) does not have everything of run %s (see %s); the journal does: "
                "`autokernel ui` brings MLflow up to date when it can be reached",
                redacted(self.tracking_uri),
                self.run_folder.name,
                self.run_folder / _LOG_NAME,
            )

    def _start(self) -> None:
        package = str(Path(autokernel.__file__).parent.parent)
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        environment = {**QUIET, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        spec = {"folder": str(self.run_folder), "tracking_uri": self.tracking_uri}
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            with open(self.run_folder / _LOG_NAME, "ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "autokernel.tracking.mlflow_follower"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    cwd=self.run_folder,
                    start_new_session=True,  # Ctrl-C is for the driver; the mirror ends when the driver has closed it
                )
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            # The URI may hold a password: standard input, unlike the command line, is nobody else's to read.
            self._child.stdin.write(json.dumps(spec).encode() + b"\n")
            self._child.stdin.flush()
            os.set_blocking(self._child.stdout.fileno(), False)
        except OSError as error:
            if self._child is None:
                self.complete = False
            self._warn(f"its process did not start: {error}")

    def _listen(self) -> bool:
        """Take in what the child said, without waiting.

        Returns:
            Whether it said anything.
        """
        if self._child is None or self._child.stdout is None or self._child.stdout.closed:
            return False
        data = self._child.stdout.read() or b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._heard(json.loads(line))
        return bool(data)

    def _heard(self, fields: dict[str, Any]) -> None:
        if "experiment_id" in fields:
            self.experiment_id = str(fields["experiment_id"])
        if "problem" in fields:
            self._warn(str(fields["problem"]))
        if "recovered" in fields:
            logger.info("MLflow (%s) answers again and is up to date", redacted(self.tracking_uri))

    def _warn(self, problem: str) -> None:
        """Once per run: a server that comes and goes must not fill the screen."""
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(
            level,
            "MLflow (%s) cannot be written to, the run goes on and its journal has everything: %s",
            redacted(self.tracking_uri),
            problem,
        )
