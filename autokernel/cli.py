"""The `autokernel` command: the only file that prints. Results go to standard output, everything else to standard error.

Exit codes: 0 done (also if nothing beat stock), 1 failed, 2 wrong input, 130 interrupted. Heavy imports wait for their command.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import autokernel
from autokernel.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from autokernel.display.logs import LogFile
    from autokernel.display.progress import LiveProgress, PlainProgress
    from autokernel.display.session import Session
    from autokernel.tracking.summary import RunSummary

_PIPED_WIDTH = 120  # columns where there is no terminal to ask

app = typer.Typer(
    name="autokernel",
    help="Makes a PyTorch model faster, with proof: searches kernel configs, validates them, exports a bundle for "
    "torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done (also if nothing beat stock), 1 failed, 2 wrong input, 130 interrupted.",
)

cache_app = typer.Typer(invoke_without_command=True)
app.add_typer(cache_app, name="cache")

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="An experiment's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a key of the experiment; may be repeated.")
]
Runs = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where runs are kept.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on with the newest unfinished run of the same experiment, or start anew.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the experiment and say what would be done.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More of the log, and tracebacks.")]

_RUNS = Path("runs")


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "×" instead of failing
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends stops as cleanly as Ctrl-C
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `autokernel show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if version:
        typer.echo(autokernel.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _add_stage(name: str, until: str, help_text: str) -> None:
    """A command that does the job up to a stage, going on from what an earlier command wrote."""

    def command(
        experiment: ExperimentFile,
        overrides: Overrides = None,
        runs: Runs = _RUNS,
        resume: Resume = True,
        dry_run: DryRun = False,
        as_json: AsJson = False,
        verbose: Verbose = False,
    ) -> None:
        request = _Request(experiment, tuple(overrides or ()), runs, not resume, as_json, verbose, until)
        (_dry_run if dry_run else _run)(request)

    app.command(name, help=help_text)(command)


_add_stage("run", "prove", "Profile, search, validate, export and prove: the whole job.")
_add_stage("profile", "profile", "Find the hotspots: what the model spends its time on, ranked by what could be gained.")
_add_stage("search", "search", "Profile if need be, then try candidates for each hotspot.")
_add_stage("validate", "validate", "Search if need be, then confirm winners and judge the whole model with them.")
_add_stage("export", "export", "Validate if need be, then write the bundle.")


@app.command()
def show(
    which: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder or id, or an experiment's name; default: the newest.")
    ] = None,
    runs: Runs = _RUNS,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show a run's results from its journal; also of a run that still goes on, or was killed."""
    with _command(verbose):
        from autokernel.display.lookup import find_run, runs_folder_of, summary_of
        from autokernel.display.results import result_json
        from autokernel.display.tables import result_view

        folder = find_run(which, runs)
        summary = summary_of(folder)
        if as_json:
            _print_json(result_json(summary, folder))
        else:
            _print(result_view(summary, folder, runs_folder_of(folder, runs)))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder, .zip or bundle.json.", exists=True)],
    experiment: ExperimentFile,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option("--rounds", min=11, help="Paired rounds of every comparison.")] = 21,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check a bundle on this machine: is every entry hit, right, and still faster than stock? Exit code 1 if not."""
    with _command(verbose) as (terminal, _):
        from autokernel.config import load_experiment
        from autokernel.display.verification import verify_view
        from autokernel.export.bundle import read_bundle

        loaded = load_experiment(experiment, tuple(overrides or ()))
        try:
            read_bundle(bundle)
        except BundleError as error:  # what was named is no bundle: that is not a bundle that does not hold
            raise ConfigError(str(error)) from None
        from autokernel.export.verify import verify as verify_bundle

        with terminal.console.status("Compiling and timing the model with the bundle and without ..."):
            report = verify_bundle(bundle, loaded, rounds=rounds)
        if as_json:
            _print_json(report.to_json())
        else:
            _print(verify_view(report))
        if not report.passed:
            raise typer.Exit(1)


@app.command()
def ui(
    runs: Runs = _RUNS,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: 5000, or a free one.", show_default=False)
    ] = None,
    tracking: Annotated[
        str | None, typer.Option("--tracking", metavar="URI", help="MLflow tracking URI; default: that of the newest run.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Open MLflow's user interface on the recorded runs. Ctrl-C ends it."""
    with _command(verbose) as (terminal, _):
        from autokernel.display.lookup import tracking_of_newest
        from autokernel.tracking.mlflow_writer import sync_runs
        from autokernel.tracking.ui import find_experiment, open_ui, require_database

        uri, name = tracking_of_newest(runs)
        if tracking is not None:
            require_database(tracking)  # syncing would make a new one where the name is misspelt
        with terminal.console.status("Starting MLflow ..."):
            stack = contextlib.ExitStack()
            if not (tracking or uri).startswith("http"):
                sync_runs(runs, tracking or uri)  # what a killed run, or a server that was away, did not get
            opened = stack.enter_context(open_ui(tracking or uri, host, port))
        with stack:
            experiment_id = find_experiment(tracking or uri, name) if name else None
            _print(opened.url(experiment_id))
            sys.stdout.flush()
            if opened.process is not None:
                terminal.say("Ctrl-C ends it.", "dim")
                with contextlib.suppress(KeyboardInterrupt):
                    opened.wait()


@app.command()
def doctor(runs: Runs = _RUNS, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """What is installed, what this machine can tune, what is missing and the command that fixes it."""
    with _command(verbose) as (terminal, _):
        from autokernel.display.health import doctor_view
        from autokernel.doctor import examine

        with terminal.console.status("Looking at this machine ..."):
            report = examine(runs)
        if as_json:
            _print_json(report.to_json())
        else:
            _print(doctor_view(report))
        if not report.can_run:
            raise typer.Exit(1)


@cache_app.callback()
def cache(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the compiled CuTe DSL kernels that are kept on this machine, or clear them."""
    if context.invoked_subcommand is None:
        with _command(verbose=False):
            from autokernel.display.kernels import ObjectCache, cache_view

            found = ObjectCache().statistics()
            _print_json(found.to_json()) if as_json else _print(cache_view(found))


@cache_app.command("clear")
def clear_cache(
    older_than: Annotated[float, typer.Option("--older-than", metavar="DAYS", min=0, help="Only what was unused so long.")] = 0,
) -> None:
    """Delete compiled kernels; they are compiled again where they are needed. Bundles have their own."""
    with _command(verbose=False):
        from autokernel.display.kernels import ObjectCache, megabytes

        count, num_bytes = ObjectCache().clear(older_than * 86400)
        _print(f"Deleted {count:,} compiled kernels, {megabytes(num_bytes)}.")


@app.command()
def schema() -> None:
    """Print the JSON schema of experiments, for editors."""
    from autokernel.config import Experiment

    _print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()})


@dataclass(frozen=True, slots=True)
class _Request:
    """What `run` and its parts were asked for."""

    experiment: Path
    overrides: tuple[str, ...]
    runs: Path
    fresh: bool
    as_json: bool
    verbose: bool
    until: str

    @property
    def resume_command(self) -> str:
        """The command that goes on where this one was interrupted: the same one, without --fresh and passwords."""
        from autokernel.config_messages import without_passwords as shown

        settings = [word for override in self.overrides for word in ("--set", shown(override))]
        words = ["run" if self.until == "prove" else self.until, str(self.experiment), *settings]
        return shlex.join(["autokernel", *words, *([] if self.runs == _RUNS else ["--runs", str(self.runs)])])


@dataclass(frozen=True, slots=True)
class _Terminal:
    """Standard error of one command: what everything but results is said through."""

    console: Console

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


@contextlib.contextmanager
def _command(verbose: bool) -> Iterator[tuple[_Terminal, Session]]:
    from autokernel.display.session import open_session

    terminal = _Terminal(_console(sys.stderr))
    with open_session(terminal.say, verbose) as session:
        yield terminal, session


def _run(request: _Request) -> None:
    """Run the pipeline up to a stage, with live progress, then show what came of it."""
    with _command(request.verbose) as (terminal, session):
        from autokernel.config import load_experiment
        from autokernel.display.logs import LogFile, write_report_of
        from autokernel.display.lookup import summary_of
        from autokernel.display.results import result_json

        session.log_file = LogFile(request.runs)
        session.on_failure = _failure_json(session.log_file, request) if request.as_json else None
        loaded = load_experiment(request.experiment, request.overrides)
        session.resume_command = request.resume_command
        from autokernel.pipeline import run as run_pipeline

        display = _display(terminal, request)
        try:
            outcome = run_pipeline(
                loaded,
                runs_folder=request.runs,
                fresh=request.fresh,
                until=request.until,
                recorders=[session.log_file, display],
            )
        finally:
            display.release()
        session.on_failure = None
        summary = summary_of(outcome.folder)
        if request.until in ("prove", "export"):
            write_report_of(outcome.folder)
        if request.as_json:
            _print_json(
                {
                    **result_json(summary, outcome.folder),
                    "outcome": outcome.outcome,
                    "message": outcome.message,
                    "bundle": str(outcome.bundle) if outcome.bundle is not None else None,
                    "seconds": outcome.seconds,
                }
            )
        else:
            _print(_stage_view(summary, outcome.folder, request))


def _stage_view(summary: RunSummary, folder: Path, request: _Request) -> RenderableType:
    """What a command ends with: its own stage's table; the whole picture from `validate` on."""
    from autokernel.display.layout import spaced
    from autokernel.display.tables import heading, profile_table, result_view, search_table

    if request.until == "profile":
        return spaced([heading(summary), profile_table(summary)])
    if request.until == "search":
        return spaced([heading(summary), search_table(summary)])
    return result_view(summary, folder, request.runs)


def _display(terminal: _Terminal, request: _Request) -> LiveProgress | PlainProgress:
    """The progress display that fits where standard error goes."""
    from autokernel.display.lookup import earlier_events
    from autokernel.display.progress import LiveProgress, PlainProgress

    console, earlier = terminal.console, functools.partial(earlier_events, request.runs)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(console, earlier) if live else PlainProgress(terminal.say, earlier)


def _failure_json(log_file: LogFile, request: _Request) -> Callable[[str, str], None]:
    """With --json a failed run answers on standard output, too."""
    from autokernel.display.results import failure_json

    def write(outcome: str, sentence: str) -> None:
        found = failure_json(log_file.path.parent if log_file.path is not None else None)
        _print_json({**found, "outcome": outcome, "message": sentence, "resume": request.resume_command})

    return write


def _dry_run(request: _Request) -> None:
    with _command(request.verbose):
        from autokernel.config import load_experiment
        from autokernel.display.dry_run import plan_json, plan_table

        loaded = load_experiment(request.experiment, request.overrides)
        plan = plan_json(loaded, request.runs, fresh=request.fresh)
        _print_json(plan) if request.as_json else _print(plan_table(plan))
        if plan["problems"]:
            raise ConfigError("\n".join(plan["problems"]))
        if not request.as_json:
            _print(f"Dry run: the experiment is in order; nothing was started.\nUnchecked: {plan['unchecked']}.")


def _console(stream: Any) -> Console:
    """Colours and width of the terminal; in a pipe no colours, and a width at which tables do not wrap."""
    from rich.console import Console

    piped = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, width=_PIPED_WIDTH if piped else None)


def _print(what: RenderableType) -> None:
    _console(sys.stdout).print(what, markup=False, highlight=False)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
