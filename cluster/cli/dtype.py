"""The flag --dtype, and its values."""

from typing import Literal

DtypeName = Literal["auto", "float32", "bfloat16", "fp8", "int8"]
"""The names of model/precision.py, said again: importing them would load the model package."""
DTYPES: tuple[DtypeName, ...] = ("auto", "float32", "bfloat16", "fp8", "int8")
