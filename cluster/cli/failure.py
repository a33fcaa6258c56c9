"""Errors at the edge of the command line: one line on stderr and an exit code."""

from rich.console import Console

from wire.errors import ConfigError, MorayError

USAGE = 2
FAILED = 1


def report(error: MorayError | ValueError) -> int:
    """Prints an error as one line; returns the exit code: 2 for wrong flags or config, 1 for the rest."""
    message = error.message if isinstance(error, MorayError) else str(error)
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False)
    return USAGE if isinstance(error, ConfigError) else FAILED
