"""What can go wrong, for people: each message states the rule, the values that broke it, and the cure."""

from __future__ import annotations


def shortened(text: str, length: int = 80) -> str:
    """A text as a message shows it: all of it, or its beginning, `length` characters in all."""
    return text if len(text) <= length else text[: length - 3] + "..."


class AutokernelError(Exception):
    """Base of every error that autokernel raises on purpose. The command line prints it without a traceback."""


class ConfigError(AutokernelError):
    """An experiment, a search space or a command line says something that cannot be done. Exit code 2."""


class WorkloadError(AutokernelError):
    """The model or one of its scenarios cannot be built or run."""


class BundleError(AutokernelError):
    """A bundle is missing, damaged, or of a format this version does not read."""


class CompileError(AutokernelError):
    """A kernel could not be compiled: it is refused, or what it takes is not installed."""


class StorageError(AutokernelError):
    """The run's folder, journal or study cannot be read or written."""


class WorkerError(AutokernelError):
    """A job did not come back with a value: see the leaves for why."""


class JobTimeout(WorkerError):
    """The job ran past its deadline and its process group was killed."""


class JobCrashed(WorkerError):
    """The process that ran the job died (signal, exit, memory limit). The message carries the end of its log."""


class NoRoomError(AutokernelError, ValueError):
    """What a problem needs does not fit into the memory that is free, for now."""


class JobLost(WorkerError):
    """The worker or its node went away; the job itself is not to blame and may be tried again."""


class DeviceFull(JobLost):
    """A device that workers share had no room for the job. Only its process's end gives back for certain what it took."""

    ends_process = True
