"""Where log records go during a command: warnings as single lines to the terminal, everything to the run's `autokernel.log`.

The report, which is written beside it when a run ends, too.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Callable
from pathlib import Path

from autokernel.display.words import one_line
from autokernel.errors import StorageError
from autokernel.events import Event, RunStarted

LOG_NAME = "autokernel.log"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LineHandler(logging.Handler):
    """Records as single lines through a function that writes one.

    Args:
        write: takes a line and its level.
        level: the least that is shown.
    """

    def __init__(self, write: Callable[[str, int], None], level: int) -> None:
        super().__init__(level)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """A terminal that went away silences it."""
        with contextlib.suppress(OSError, ValueError):
            self._write(one_line(record.getMessage()), record.levelno)


class _PatientFile(logging.FileHandler):
    """A file whose disk may be full: a log is not worth a traceback on the terminal, nor a failed command."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        """Called where `emit` failed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """What could not be written is still buffered, and fails again."""
        with contextlib.suppress(OSError):
            super().close()


class LogFile:
    """A Recorder that opens `<run folder>/autokernel.log` once the run's folder is known; earlier records are kept for it.

    Args:
        runs_folder: where the run's folder will be.
        logger: whose records are kept; default: the root's, so that libraries are heard as well.
    """

    def __init__(self, runs_folder: Path, logger: logging.Logger | None = None) -> None:
        self.path: Path | None = None
        self._runs_folder = runs_folder
        self._logger = logger or logging.getLogger()
        self._early = logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)
        self._file: _PatientFile | None = None
        self._logger.addHandler(self._early)

    def record(self, event: Event) -> None:
        """Only the first RunStarted matters."""
        if not isinstance(event, RunStarted) or self._file is not None:
            return
        path = self._runs_folder.resolve() / event.name / event.run_id / LOG_NAME
        try:
            self._file = _PatientFile(path, encoding="utf-8")
        except OSError as error:
            logging.getLogger(__name__).warning("%s cannot be written, the run goes on without it: %s", path, error)
            return
        self.path = path
        self._file.setFormatter(logging.Formatter(_FORMAT))
        self._early.setTarget(self._file)
        self._early.flush()
        self._logger.removeHandler(self._early)
        self._logger.addHandler(self._file)

    def close(self) -> None:
        """Recorders are closed before the last words of a failed run are logged: `release` lets go of the file."""

    def release(self) -> None:
        """Close the file. Idempotent."""
        for handler in (self._early, self._file):
            if handler is not None:
                self._logger.removeHandler(handler)
                handler.close()


def write_report_of(folder: Path) -> None:
    """The HTML report beside a run's journal; a run does not fail for want of it."""
    from autokernel.display.tables import REPORT_NAME
    from autokernel.tracking.journal import read_journal
    from autokernel.tracking.report import write_report

    try:
        write_report(read_journal(folder), folder / REPORT_NAME)
    except (OSError, StorageError) as error:
        logging.getLogger("autokernel").warning("the report was not written: %s", error)
