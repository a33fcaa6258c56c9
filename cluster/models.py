"""Which checkpoint a config names: a directory, or a model in the box, shipped or made on first use."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from wire.errors import ConfigError

Made = Literal["tiny"]
MADE: tuple[Made, ...] = get_args(Made)
"""Models that Moray makes itself, from a fixed seed: the same bytes on every host."""
SHIPPED = ("nano",)
"""Trained models that come with Moray."""


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint on this host."""

    name: str
    """What requests call it."""
    path: Path


def cache_dir() -> Path:
    """Where models in the box are kept: MORAY_CACHE_DIR, or ~/.cache/moray."""
    return Path(os.environ.get("MORAY_CACHE_DIR") or Path.home() / ".cache" / "moray")


def find_model(model: str) -> ModelSource:
    """The checkpoint that `model` names; makes a model in the box when it is not there yet.

    Raises:
        ConfigError: it is neither a directory with a config.json nor a name in the box.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return ModelSource(path.resolve().name, path.resolve())
    if model in SHIPPED:
        return ModelSource(model, _shipped(model))
    boxed = next((name for name in MADE if name == model), None)
    if boxed is None:
        wanted = f"a directory with config.json and safetensors, or one of {', '.join((*SHIPPED, *MADE))}"
        raise ConfigError(field="model", wanted=wanted, given=model)
    made = cache_dir() / "models" / boxed
    if not (made / "config.json").is_file():
        # Imported here: only making one takes torch.
        from model.errors import CheckpointInvalid
        from model.make import make_checkpoint

        try:
            make_checkpoint(made, size=boxed, seed=0)
        except CheckpointInvalid:
            # Two commands may make it at the same moment; the directory appears whole, so either's will do.
            if not (made / "config.json").is_file():
                raise
    return ModelSource(boxed, made)


def _shipped(model: str) -> Path:
    """In a checkout beside this package, in an installed wheel inside it."""
    package = Path(__file__).resolve().parent
    for assets in (package.parent / "assets", package / "assets"):
        if (assets / model / "config.json").is_file():
            return assets / model
    wanted = f"the shipped model at {package.parent / 'assets' / model}; install Moray again"
    raise ConfigError(field="model", wanted=wanted, given="no such directory")
