"""The reference checkpoints and goldens in tests/data/reference (see its README), for any test."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

REFERENCE_DIR = Path(__file__).parent / "data" / "reference"
SHAPES = ("default", "sparse", "yarn", "fp8", "mtp")

LOGIT_TOLERANCE = 1e-4
"""Largest deviation of a logit, in units of the logits' spread; two references differ by 1.4e-5."""
ROUTER_MARGIN = 1e-5
"""Experts may differ only where the golden's own score gap is below this."""
INDEX_MARGIN = 5e-6
"""Selected positions may differ only where the golden's own relative gap is below this."""


@dataclass(frozen=True)
class Golden:
    """One prompt of one shape."""

    shape: str
    prompt_idx: int
    prompt: tuple[int, ...]
    logit_std: float

    def tensor(self, name: str) -> Tensor:
        """A tensor of this prompt, e.g. "logits" or "router_ids.1"."""
        return _tensors(self.shape)[f"p{self.prompt_idx}.{name}"]

    def has(self, name: str) -> bool:
        """Whether the goldens hold it for this prompt."""
        return f"p{self.prompt_idx}.{name}" in _tensors(self.shape)

    def __str__(self) -> str:
        return f"{self.shape}-{len(self.prompt)}"


def checkpoint_dir(shape: str) -> Path:
    """Directory of a reference checkpoint."""
    return REFERENCE_DIR / "checkpoints" / shape


def goldens(*shapes: str) -> list[Golden]:
    """Every prompt of some shapes."""
    return [golden for shape in shapes for golden in _of_shape(shape)]


def unit_tensors() -> dict[str, Tensor]:
    """Components: goldens/units.safetensors."""
    return _tensors("units")


def unit_parameters() -> dict[str, Any]:
    """What the components were made with: goldens/units.json."""
    return json.loads((REFERENCE_DIR / "goldens" / "units.json").read_text())


def _of_shape(shape: str) -> list[Golden]:
    meta = json.loads((REFERENCE_DIR / "goldens" / f"{shape}.json").read_text())
    return [Golden(shape, i, tuple(ids), meta["logit_std"]) for i, ids in enumerate(meta["prompts"])]


@functools.cache
def _tensors(shape: str) -> dict[str, Tensor]:
    return load_file(REFERENCE_DIR / "goldens" / f"{shape}.safetensors")
