"""Principal components of data that come in batches, on whatever device they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class IncrementalPCA:
    """Principal components, updated batch by batch (Ross et al., Incremental Learning for Robust Visual Tracking, 2008).

    What is known of earlier batches, their mean and S·Vᵀ, stands in for them in the decomposition of the next one. Afterwards
    there are `components_` (n, features), `singular_values_`, `explained_variance_` and `explained_variance_ratio_` (n,),
    `noise_variance_`, `mean_` and `var_` (features,), and `n_samples_seen_`.

    Args:
        n_components: how many; None or 0 for all that the first batch has.
        copy: leave the data as they are; otherwise they may be centred in place.
        batch_size: rows at a time in `fit`; five times the number of features by default.
        svd_driver: the driver of `torch.linalg.svd`, on CUDA.
        lowrank: use the randomised decomposition.
        lowrank_q: its rank; twice `n_components` by default.
        lowrank_niter: its subspace iterations.
        lowrank_seed: its seed; None to draw from torch's own generator.

    Raises:
        ValueError: `lowrank` without `n_components` or `lowrank_q`, or with a `lowrank_q` below `n_components`.
    """

    mean_: torch.Tensor
    var_: torch.Tensor
    n_samples_seen_: torch.Tensor
    components_: torch.Tensor
    singular_values_: torch.Tensor
    explained_variance_: torch.Tensor
    explained_variance_ratio_: torch.Tensor
    noise_variance_: torch.Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if not n_components:
                raise ValueError("lowrank=True needs n_components or lowrank_q.")
            lowrank_q = 2 * n_components
        if lowrank and lowrank_q < (n_components or 0):
            raise ValueError(f"lowrank_q must be at least n_components={n_components}, got {lowrank_q}.")
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_features_: int | None = None

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Start over with these data, in batches.

        Args:
            X: (samples, features).
            check_input: make a floating-point tensor of them, and see that it is a finite matrix.

        Returns:
            itself.

        Raises:
            ValueError: they are no finite matrix, or `n_components` does not go with their shape.
        """
        if check_input:
            X = self._checked(X)
        self.n_features_ = None
        if self.batch_size is None:
            self.batch_size = 5 * X.shape[1]
        for rows in self.gen_batches(len(X), self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[rows], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Add one batch.

        Args:
            X: (samples, features).
            check_input: as in `fit`.

        Returns:
            itself.

        Raises:
            ValueError: it is no finite matrix, or `n_components` or the batches before do not go with its shape.
        """
        if check_input:
            X = self._checked(X)
        first = self.n_features_ is None
        self._check_shape(X, first)
        batch_var, batch_mean = torch.var_mean(X.double(), 0, correction=0)
        if first:
            self.n_components = self.n_components or min(X.shape)
            self.n_features_ = X.shape[1]
            mean, var, seen = batch_mean, batch_var, torch.tensor([len(X)], device=X.device)
            stack = X.sub_(mean)
        else:
            before, seen = self.n_samples_seen_, self.n_samples_seen_ + len(X)
            shift = self.mean_ - batch_mean
            mean = (before * self.mean_ + len(X) * batch_mean) / seen
            var = (before * self.var_ + len(X) * batch_var + before * len(X) / seen * shift.square()) / seen
            known = self.singular_values_.unsqueeze(1) * self.components_
            stack = torch.vstack([known, X.sub_(batch_mean), (before / seen * len(X)).sqrt() * shift])
        S, Vh = self._decomposed(stack)
        self.mean_, self.var_, self.n_samples_seen_ = mean, var, seen
        explained, total = S.square() / (seen - 1), (var * seen).sum()
        n = self.n_components
        self.components_, self.singular_values_ = Vh[:n], S[:n]
        self.explained_variance_, self.explained_variance_ratio_ = explained[:n], (S.square() / total)[:n]
        self.noise_variance_ = explained[n:].mean() if n < len(explained) else torch.zeros((), device=X.device)
        return self

    def _checked(self, X: Any) -> torch.Tensor:
        matrix = torch.as_tensor(X)
        if matrix.dim() != 2 or not matrix.isfinite().all():
            raise ValueError(
                "IncrementalPCA takes a finite matrix (samples, features), got "
                + ("values that are not finite." if matrix.dim() == 2 else f"the shape {tuple(matrix.shape)}.")
            )
        if matrix.dtype not in (torch.float32, torch.float64):
            return matrix.float()
        return matrix.clone() if self.copy and matrix is X else matrix

    def _check_shape(self, X: torch.Tensor, first: bool) -> None:
        samples, features = X.shape
        if not first and features != self.n_features_:
            raise ValueError(f"This batch has {features} features, the ones before had {self.n_features_}.")
        if self.n_components and self.n_components > features:
            raise ValueError(f"n_components={self.n_components} is more than there are features: {features}.")
        if self.n_components and self.n_components > samples:
            raise ValueError(
                f"n_components={self.n_components} is more than there are samples in the batch: {samples}."
            )

    def _decomposed(self, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values and right singular vectors, each with its largest entry positive."""
        if self.lowrank:
            with _seeded(self.lowrank_seed, stack.device):
                _, S, V = torch.svd_lowrank(stack, q=self.lowrank_q, niter=self.lowrank_niter)
            Vh = V.mT
        else:
            _, S, Vh = torch.linalg.svd(stack, full_matrices=False, driver=self.svd_driver)
        largest = Vh.abs().argmax(1, keepdim=True)
        return S, Vh * Vh.gather(1, largest).sign()

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """Coordinates of data along the components.

        Args:
            X: (samples, features).

        Returns:
            (samples, n_components), in the dtype of X.
        """
        centred = X.double() - self.mean_
        return (centred @ self.components_.to(centred.dtype).T).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices that cut n rows into batches.

        Args:
            n: how many rows.
            batch_size: how many in a batch.
            min_batch_size: what would be left with less goes into the batch before.
        """
        start = 0
        while start < n:
            end = start + batch_size
            if end + min_batch_size > n:
                end = n
            yield slice(start, end)
            start = end


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Context with a seed of its own; the generators go on afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
