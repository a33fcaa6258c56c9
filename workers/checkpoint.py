"""Opening a checkpoint in a worker: the model's errors become the error that crosses a process."""

from pathlib import Path

from model.checkpoint import Checkpoint
from model.errors import ModelError
from wire.errors import ModelBroken


def open_checkpoint(checkpoint_dir: Path) -> Checkpoint:
    """The checkpoint, checked from its headers.

    Raises:
        ModelBroken: with the model's own message, which names the file, field or tensor.
    """
    try:
        checkpoint = Checkpoint.open(checkpoint_dir)
        checkpoint.check()
    except ModelError as error:
        raise ModelBroken(str(error)) from error
    return checkpoint
