"""Products that other threads compute: the same bits, whoever asks when, and no memory that is given away."""

import gc
import threading
from typing import get_args

import pytest
import torch

from model.kernels.native.kernels import FEW_ROWS, NativeKernels, NativeMlp
from model.precision import Form
from tests.unit.model.implementations import NATIVE, named_kernels
from tests.unit.model.kernels.cases import random, stored_matrix

WIDTH, HIDDEN = 33, 50


@pytest.fixture(params=NATIVE)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """With threads to spare; a process has one number of them, as workers have."""
    kernels = named_kernels(request.param, num_threads=3)
    assert isinstance(kernels, NativeKernels)
    return kernels


def _mlp(kernels: NativeKernels, form: Form = "int8") -> NativeMlp:
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    gate, up, down = (stored_matrix(*shape, seed=i) for i, shape in enumerate(shapes))
    mlp = kernels.pack_mlp(gate, up, down, form)
    assert isinstance(mlp, NativeMlp)
    return mlp


@pytest.mark.parametrize("num_rows", [0, 1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("form", get_args(Form))
def test_bits_are_those_of_the_caller(kernels: NativeKernels, form: Form, num_rows: int) -> None:
    mlp, x = _mlp(kernels, form), random(num_rows, HIDDEN, seed=5)
    assert torch.equal(mlp.begin(x).result(), mlp(x))


def test_several_are_under_way_and_are_asked_for_in_any_order(kernels: NativeKernels) -> None:
    mlp = _mlp(kernels)
    xs = [random(1 + i % 40, HIDDEN, seed=i) for i in range(60)]
    expected = [mlp(x) for x in xs]
    begun = [mlp.begin(x) for x in xs]
    for i in (*range(59, -1, -2), *range(0, 60, 2)):
        assert torch.equal(begun[i].result(), expected[i])


def test_result_is_there_for_who_asks_again(kernels: NativeKernels) -> None:
    begun = _mlp(kernels).begin(random(3, HIDDEN, seed=6))
    assert begun.result() is begun.result()


def test_rows_that_nobody_asks_for_keep_their_memory_until_they_are_there(kernels: NativeKernels) -> None:
    """Memory that is given away too soon would show in what is allocated next."""
    mlp = _mlp(kernels)
    for seed in range(200):
        mlp.begin(random(FEW_ROWS, HIDDEN, seed=seed))
        fresh = torch.zeros(FEW_ROWS, HIDDEN)
        gc.collect(0)
        mlp.begin(random(1, HIDDEN, seed=seed)).result()
        assert not fresh.any()


def test_strided_rows_are_taken(kernels: NativeKernels) -> None:
    mlp, x = _mlp(kernels), random(7, 2 * HIDDEN, seed=7)
    assert torch.equal(mlp.begin(x[:, :HIDDEN]).result(), mlp(x[:, :HIDDEN].contiguous()))
    assert torch.equal(mlp.begin(x[:, ::2]).result(), mlp(x[:, ::2].contiguous()))


def test_threads_of_the_caller_do_not_mix_each_others_rows(kernels: NativeKernels) -> None:
    mlp = _mlp(kernels)
    wrong: list[int] = []

    def ask(first_seed: int) -> None:
        for seed in range(first_seed, first_seed + 50):
            x = random(9, HIDDEN, seed=seed)
            if not torch.equal(mlp.begin(x).result(), mlp(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
