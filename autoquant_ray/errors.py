"""The one tree of errors that users see.

Every message says what failed, names the value, and says what to do. All classes are picklable
(they cross process borders inside Ray). The command line maps each class to an exit code.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NEEDS_A_LOOK = 3
EXIT_INFEASIBLE = 4
EXIT_INTERRUPTED = 130


class AutoQuantError(Exception):
    """Base of all errors that the package raises on purpose."""

    exit_code = EXIT_FAILED


class ConfigError(AutoQuantError):
    """A configuration value, flag or job file is wrong."""

    exit_code = EXIT_USAGE


class ModelError(AutoQuantError):
    """The model cannot be read, or is not one that can be scanned."""

    exit_code = EXIT_USAGE


class DataError(AutoQuantError):
    """The calibration data cannot be read or holds no usable sample."""

    exit_code = EXIT_USAGE


class FormatError(AutoQuantError):
    """A quantization format is unknown, or cannot run on this device or module."""

    exit_code = EXIT_USAGE


class ClusterError(AutoQuantError):
    """The Ray cluster cannot be reached, or lacks what was asked for."""

    exit_code = EXIT_USAGE


class TokenError(ClusterError):
    """The Ray cluster wants a token, or another one."""

    exit_code = EXIT_FAILED


class InfeasibleBudgetError(AutoQuantError):
    """No allocation meets the budget and the constraints."""

    exit_code = EXIT_INFEASIBLE


class StoreError(AutoQuantError):
    """A run directory is missing, foreign, in use, damaged or cannot be written."""

    exit_code = EXIT_USAGE


class ChangedError(StoreError):
    """An unfinished run cannot go on: its config, model, data or packages are others now."""


class StoreLostError(StoreError):
    """A place that should be written cannot be: its disk is full, read-only or broken."""

    exit_code = EXIT_FAILED


class HeldError(StoreError):
    """Another process is at work there."""


class ScoreError(AutoQuantError):
    """Scores are missing or wrong where they must not be."""


class CheckpointError(AutoQuantError):
    """A checkpoint that was written does not hold what the manifest says."""


class WorkerError(AutoQuantError):
    """Work failed in a worker process; the message names the shard."""


class NonFiniteError(WorkerError):
    """A shard produced a NaN or an infinity; the same shard would do so on any worker."""


class Interrupted(KeyboardInterrupt):
    """The program was asked to stop and stopped in order; the message says what is kept."""


def not_finite(what: str) -> NonFiniteError:
    """The error for numbers that overflowed, or were none to begin with.

    Args:
        what: Which, with their value.
    """
    return NonFiniteError(
        f"{what}; look for NaN and infinite weights in the model's files, or compute in another "
        "type (`dtype` float32)"
    )


def changed_input(name: str, label: str | None = None) -> WorkerError:
    """The error for a model that adds to a module's input in place, so that it is lost.

    Args:
        name: The module.
        label: What leaves it out of the search; default its name.
    """
    return WorkerError(f"the model changes the input of {name} in place; `disable` {label or name}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line of at most ``limit`` characters; its class where empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
