"""Loads of experts in consecutive windows of time, in eight families, the same for the same seed.

Every family gives each expert of each layer a popularity; a window draws row counts from it (Poisson),
131,072 tokens that choose 8 experts each, so no expert has more than one row of every token.

Letters: L layers, E logical experts.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_TOKENS, TOP_K = 131_072, 8
NUM_GROUPS = 8


def windows(
    family: str, *, seed: int, num_windows: int, num_layers: int = 58, num_experts: int = 256
) -> Iterator[Floats]:
    """Row counts (L, E) of one window after the other.

    Args:
        family: a key of FAMILIES.
        seed: of all that is drawn.
        num_windows: how many.
        num_layers: L.
        num_experts: E.
    """
    draws = np.random.Generator(np.random.PCG64([seed, list(FAMILIES).index(family)]))
    popularity = FAMILIES[family](draws, (num_layers, num_experts))
    for _ in range(num_windows):
        share_LE = _at_most_once_a_token(next(popularity))
        rows_LE = np.minimum(draws.poisson(share_LE * NUM_TOKENS * TOP_K), NUM_TOKENS)
        yield rows_LE.astype(np.float64)


def _at_most_once_a_token(popularity_LE: Floats) -> Floats:
    """(L, E) shares of the rows, none above one row of every token; the others get what is cut off."""
    share_LE: Floats = popularity_LE / popularity_LE.sum(axis=1, keepdims=True)
    most = 1 / TOP_K
    for _ in range(20):
        is_over_LE = share_LE > most
        if not is_over_LE.any():
            break
        cut_L1 = np.where(is_over_LE, share_LE - most, 0.0).sum(axis=1, keepdims=True)
        rest_LE = np.where(is_over_LE, 0.0, share_LE)
        grown_LE = share_LE + cut_L1 * rest_LE / rest_LE.sum(axis=1, keepdims=True)
        share_LE = np.where(is_over_LE, most, grown_LE)
    return share_LE


Shape = tuple[int, int]
Family = Callable[[np.random.Generator, Shape], Iterator[Floats]]


def _forever(popularity_LE: Floats) -> Iterator[Floats]:
    while True:
        yield popularity_LE


def _zipf(exponent: float) -> Family:
    """Popularity rank ** -exponent, ranks drawn for every layer."""

    def family(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
        by_rank = np.arange(1, shape[1] + 1, dtype=np.float64) ** -exponent
        yield from _forever(np.stack([by_rank[draws.permutation(shape[1])] for _ in range(shape[0])]))

    return family


def _log_normal(sigma: float) -> Family:
    """Log-normal popularity."""

    def family(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
        yield from _forever(np.exp(draws.standard_normal(shape) * sigma))

    return family


def _grouped(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
    """Log-normal, a part of it common to the experts of a group."""
    common = draws.standard_normal((shape[0], NUM_GROUPS, 1)) * 0.6
    own = draws.standard_normal((shape[0], NUM_GROUPS, shape[1] // NUM_GROUPS)) * 0.5
    yield from _forever(np.exp(common + own).reshape(shape))


def _few_hot(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
    """Nearly level, but four experts of every layer are six times as popular."""
    popularity_LE = np.exp(draws.standard_normal(shape) * 0.25)
    for popularity_E in popularity_LE:
        popularity_E[draws.choice(shape[1], 4, replace=False)] *= 6
    yield from _forever(popularity_LE)


def _drifting(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
    """The logarithm walks: 0.95 of it stays from window to window, its spread stays 0.9."""
    kept, spread = 0.95, 0.9
    log_LE = draws.standard_normal(shape) * spread
    while True:
        yield np.exp(log_LE)
        log_LE = kept * log_LE + (1 - kept**2) ** 0.5 * spread * draws.standard_normal(shape)


def _switching(draws: np.random.Generator, shape: Shape) -> Iterator[Floats]:
    """Two kinds of traffic, mixed 100/0, 75/25, 50/50, 25/75, 0/100 and back."""
    first_LE, second_LE = np.exp(draws.standard_normal((2, *shape)) * 0.8)
    first_LE, second_LE = (kind / kind.sum(axis=1, keepdims=True) for kind in (first_LE, second_LE))
    while True:
        for part in (0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25):
            yield (1 - part) * first_LE + part * second_LE


FAMILIES: dict[str, Family] = {
    "zipf08": _zipf(0.8),
    "zipf12": _zipf(1.2),
    "logn05": _log_normal(0.5),
    "logn10": _log_normal(1.0),
    "groupcorr": _grouped,
    "hotfew": _few_hot,
    "drift": _drifting,
    "switch": _switching,
}
"""The order is part of the seed."""
