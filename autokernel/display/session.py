"""One command from its start to its exit code: where its log goes, and what an error becomes."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import typer

from autokernel.display.logs import LineHandler
from autokernel.errors import AutokernelError, ConfigError

if TYPE_CHECKING:
    from autokernel.display.logs import LogFile

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

log = logging.getLogger("autokernel.command")

Say = Callable[[str, str], None]


@dataclass(slots=True)
class Session:
    """What a command tells about itself while it runs, for the case that it fails.

    `say` writes a text in a style to standard error. `on_failure` is told the outcome and the sentence.
    """

    say: Say
    verbose: bool
    log_file: LogFile | None = None
    on_failure: Callable[[str, str], None] | None = None
    resume_command: str = ""


@contextlib.contextmanager
def open_session(say: Say, verbose: bool) -> Iterator[Session]:
    """Logs to standard error while a command runs, and an exit code for whatever it raises.

    Raises:
        typer.Exit: with 1, 2 or 130 if the command failed; why has been said.
    """
    session = Session(say, verbose)
    handler = LineHandler(_log_writer(say), logging.INFO if verbose else logging.WARNING)
    handler.addFilter(lambda record: record.name != log.name)  # what is logged below has been said already
    package = logging.getLogger("autokernel")
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield session
    except KeyboardInterrupt:
        hint = f"; this goes on from here: {session.resume_command}" if session.resume_command else ""
        _fail(session, INTERRUPTED, f"Interrupted{hint}", "interrupted")
    except ConfigError as error:
        log.info("wrong input", exc_info=True)
        _fail(session, WRONG_INPUT, str(error), "failed")
    except AutokernelError as error:
        log.info("failed", exc_info=True)
        _fail(session, FAILED, str(error), "failed")
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:  # the command's outermost boundary: whatever it is, it is one sentence and a log
        log.exception("unexpected")
        _fail(session, FAILED, f"Unexpected {type(error).__name__}: {error or 'no message'}{_where(session)}", "failed")
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        if session.log_file is not None:
            session.log_file.release()


def _log_writer(say: Say) -> Callable[[str, int], None]:
    def write(line: str, level: int) -> None:
        style = "red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else "dim"
        word = f"{logging.getLevelName(level).lower()}: " if level >= logging.WARNING else ""
        say(f"{word}{line}", style)

    return write


def _where(session: Session) -> str:
    if session.log_file is not None and session.log_file.path is not None:
        return f"; the traceback is in {session.log_file.path}"
    return "" if session.verbose else "; -v shows the traceback"


def _fail(session: Session, code: int, sentence: str, outcome: str) -> NoReturn:
    """Say why and leave."""
    with contextlib.suppress(OSError, ValueError):
        if session.verbose and code != INTERRUPTED:
            session.say(traceback.format_exc().rstrip(), "dim")
        session.say(sentence, "yellow" if code == INTERRUPTED else "red")
    if session.on_failure is not None:
        session.on_failure(outcome, sentence)
    raise typer.Exit(code)
