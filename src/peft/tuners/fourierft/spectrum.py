"""The mathematics of FourierFT: a few entries of a spectrum, and the matrix that they stand for."""

from __future__ import annotations

import torch


def draw_places(shape: tuple[int, int], count: int, seed: int) -> torch.Tensor:
    """Where in a matrix the entries of a spectrum are: distinct places, the same ones for the same shape and seed.

    Args:
        shape: of the matrix.
        count: how many.
        seed: of a generator on the CPU.

    Returns:
        Rows and columns, (2, count) int64.
    """
    rows, columns = shape
    places = torch.randperm(rows * columns, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:count]
    return torch.stack([places // columns, places % columns])


def inverse_transform(spectrum: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The real part of the inverse two-dimensional Fourier transform of a matrix that is zero but for some places.

    Args:
        spectrum: the entries there, (n,), float32 or float64.
        places: rows and columns, (2, n).
        shape: of the matrix.
    """
    dense = spectrum.new_zeros(shape).index_put((places[0], places[1]), spectrum)
    return torch.fft.ifft2(dense).real
