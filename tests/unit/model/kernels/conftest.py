"""Every kernel test runs on every implementation that this machine has."""

import pytest

from model.kernels.base import Kernels
from tests.unit.model.implementations import IMPLEMENTATIONS, NATIVE, named_kernels


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """One implementation, with one thread; skips where it cannot run."""
    return named_kernels(request.param)


@pytest.fixture(scope="session", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Kernels:
    """Every native implementation: those whose bits are promised."""
    return named_kernels(request.param)
