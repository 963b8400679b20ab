"""Updates of one module as matrices, and how a sum of them comes back to a product of two small ones.

An update known by its factors is never built: norms, cosines and singular values of B A follow from the Gram matrices
A A^T and B^T B, which are as small as the rank. An update known only as a matrix is decomposed exactly where it is small,
and by randomised range finding (Halko et al. 2011, arXiv 0909.4061) where it is not; what that loses is reported.

All of it is numpy, so that merging LoRA files does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError
from peftcli.lazy import numpy

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

EXACT_SIZE = 768
"""Up to this many rows or columns a matrix is decomposed exactly: seconds at most."""
OVERSAMPLING, POWER_STEPS = 16, 2
NEGLIGIBLE = 1e-10
"""Singular values below this share of the largest are rounding: float64 has 1e-16."""
INDEPENDENT = 1e-4
"""Share of each factor's squared norm outside the span of the others before it, from which on Gram matrices are exact
enough: they are good to 1e-16."""
SAMPLED_ROWS, SAMPLED_COLUMNS = 64, 128
"""Evenly spaced places of a module at which signs are compared."""


@dataclass(frozen=True)
class LowRank:
    """B A.

    Attributes:
        a: [r, in].
        b: [out, r], the scaling in it.
    """

    a: NDArray[Any]
    b: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @cached_property
    def grams(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """A A^T and B^T B, float64 [r, r]."""
        a, b = self.a.astype("f8"), self.b.astype("f8")
        return a @ a.T, b.T @ b

    def weighted(self, weights: NDArray[Any]) -> LowRank:
        """The same with the columns of B times `weights` [r]."""
        made = LowRank(self.a, self.b * weights.astype(self.b.dtype))
        a, b = self.grams
        vars(made)["grams"] = a, b * weights * weights[:, None]
        return made

    def dense(self) -> NDArray[Any]:
        return (self.b @ self.a).astype("f4", copy=False)

    def sample(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
        """The product at some rows and columns."""
        return self.b[rows] @ self.a[:, columns]

    def norm(self) -> float:
        a, b = self.grams
        return float(max((a * b).sum(), 0.0) ** 0.5)


@dataclass(frozen=True)
class Dense:
    """A matrix [out, in], float32, that is no product of small ones as far as we know.

    Attributes:
        matrix: the update.
        rank: the rank to give it where none is asked for: the method's own, or a usual one.
    """

    matrix: NDArray[Any]
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> NDArray[Any]:
        return self.matrix

    def sample(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
        return self.matrix[numpy.ix_(rows, columns)]

    def norm(self) -> float:
        return float(numpy.linalg.norm(self.matrix))


Update = LowRank | Dense


@dataclass(frozen=True)
class Rank:
    """How many directions are kept: a number of them, or as many as hold a share of the energy (squared norm).

    Attributes:
        number: at most so many.
        energy: as few as hold this share; None keeps `number`.
    """

    number: int | None = None
    energy: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rank:
        """`16` is a number, `0.95` a share."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if 0 < value < 1:
            return cls(energy=value)
        if value >= 1 and value == int(value):
            return cls(number=int(value))
        raise InputError(f"{text!r} is neither a rank nor a share of the energy", field="--rank", allowed="16, or 0.95")


@dataclass(frozen=True)
class Compressed:
    """An update as a product of the rank that was asked for.

    Attributes:
        factors: the product.
        energy: share of the squared norm it holds; 1 for an update that is zero.
        norm: of the whole update.
    """

    factors: LowRank
    energy: float
    norm: float


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an update, falling, and how to get the product that the first of them make.

    Attributes:
        values: [n]; of a large matrix only the first ones.
        energy: squared norm of the update.
        product: the best product of a rank, from the rank.
    """

    values: NDArray[Any]
    energy: float
    product: Callable[[int], LowRank]


def stack(updates: Sequence[LowRank]) -> LowRank:
    """The sum of B_i A_i, exactly: factors side by side."""
    if len(updates) == 1:
        return updates[0]
    a = numpy.concatenate([update.a for update in updates])
    return LowRank(a, numpy.concatenate([update.b for update in updates], axis=1))


def padded(factors: LowRank, rank: int) -> LowRank:
    """The same product with rows and columns of zeros."""
    missing = rank - factors.rank
    if not missing:
        return factors
    a, b = numpy.pad(factors.a, ((0, missing), (0, 0))), numpy.pad(factors.b, ((0, 0), (0, missing)))
    return LowRank(a, b)


def inner_products(updates: Sequence[Update], stacked: LowRank | None) -> NDArray[Any]:
    """Frobenius inner products of all pairs, float64 [n, n].

    Args:
        updates: n of them.
        stacked: their `stack` if all are products; then none is built.
    """
    if stacked is not None:
        starts = numpy.cumsum([0, *(update.rank for update in updates[:-1] if isinstance(update, LowRank))])
        a, b = stacked.grams
        return numpy.add.reduceat(numpy.add.reduceat(a * b, starts, axis=0), starts, axis=1)
    return numpy.array([[_inner(first, second) for second in updates] for first in updates])


def _inner(first: Update, second: Update) -> float:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return float(((first.b.T @ second.b) * (first.a @ second.a.T)).sum(dtype="f8"))
    if isinstance(first, Dense):
        first, second = second, first
    assert isinstance(second, Dense)
    if isinstance(first, LowRank):
        return float((first.b * (second.matrix @ first.a.T)).sum(dtype="f8"))
    return float((first.matrix * second.matrix).sum(dtype="f8"))


def compress(update: Update, rank: Rank, generator: Generator) -> Compressed:
    """The best product of a rank to stand for an update. `Rank()` drops only what is rounding.

    Args:
        generator: randomness of the decomposition of large matrices.
    """
    if isinstance(update, Dense):
        spectrum = _matrix_spectrum(update.matrix, rank, generator)
    elif (roots := _independent_roots(update)) is None:
        spectrum = _thin_spectrum(update)
    elif rank == Rank():
        return Compressed(update, 1.0, update.norm())
    else:
        spectrum = _gram_spectrum(update, *roots)
    count = _count(spectrum.values, spectrum.energy, rank)
    kept, total = float((spectrum.values[:count].astype("f8") ** 2).sum()), spectrum.energy
    return Compressed(spectrum.product(count), min(kept / total, 1.0) if total > 0 else 1.0, total**0.5)


def _independent_roots(update: LowRank) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Cholesky's L of both Gram matrices, or None where A's rows or B's columns are nearly dependent."""
    roots = []
    for gram in update.grams:
        size = numpy.sqrt(gram.diagonal())
        try:
            root = numpy.linalg.cholesky(gram)
        except numpy.linalg.LinAlgError:
            return None
        if (root.diagonal() ** 2 < INDEPENDENT * size**2).any():
            return None
        roots.append(root)
    return roots[0], roots[1]


def _gram_spectrum(update: LowRank, root_a: NDArray[Any], root_b: NDArray[Any]) -> Spectrum:
    """By the roots of the Gram matrices: for A = L_a Q_a and B = Q_b L_b^T the small core is L_b^T L_a."""
    u, s, vh = numpy.linalg.svd(root_b.T @ root_a)

    def product(rank: int) -> LowRank:
        a = numpy.linalg.solve(root_a.T, vh[:rank].T).T
        b = numpy.linalg.solve(root_b.T, u[:, :rank] * s[:rank])
        return LowRank(_times(a, update.a), _times(update.b, b))

    return Spectrum(s, float((s**2).sum()), product)


def _times(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    return first.astype("f8") @ second.astype("f8")


def _thin_spectrum(update: LowRank) -> Spectrum:
    """By QR: for B = Q_b R_b and A^T = Q_a R_a the small core is R_b R_a^T."""
    q_b, r_b = numpy.linalg.qr(update.b.astype("f8"))
    q_a, r_a = numpy.linalg.qr(update.a.astype("f8").T)
    u, s, vh = numpy.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Spectrum(s, float((s**2).sum()), lambda rank: LowRank(vh[:rank] @ q_a.T, q_b @ (u[:, :rank] * s[:rank])))


def _matrix_spectrum(matrix: NDArray[Any], rank: Rank, generator: Generator) -> Spectrum:
    size = min(matrix.shape)
    wanted = size if rank.number is None else rank.number + OVERSAMPLING
    is_whole = size <= EXACT_SIZE or wanted * 3 >= size
    if is_whole:
        u, s, vh = numpy.linalg.svd(matrix, full_matrices=False)
    else:
        basis = numpy.linalg.qr(matrix @ generator.standard_normal((matrix.shape[1], wanted), dtype="f4"))[0]
        for _ in range(POWER_STEPS):
            basis = numpy.linalg.qr(matrix @ numpy.linalg.qr(matrix.T @ basis)[0])[0]
        u, s, vh = numpy.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    energy = (s.astype("f8") ** 2).sum() if is_whole else numpy.linalg.norm(matrix) ** 2
    return Spectrum(s, float(energy), lambda rank: LowRank(vh[:rank], u[:, :rank] * s[:rank]))


def _count(s: NDArray[Any], total: float, rank: Rank) -> int:
    """How many singular values to keep; one at least, so that factors have a shape."""
    count = int((s > NEGLIGIBLE * s[:1]).sum()) if len(s) else 0
    if rank.energy is not None and total > 0:
        reached = numpy.cumsum(s.astype("f8") ** 2) >= rank.energy * total
        count = min(count, int(reached.argmax()) + 1 if reached.any() else len(s))
    if rank.number is not None:
        count = min(count, rank.number)
    return max(count, 1)


def sign_conflicts(updates: Sequence[Update], weights: Sequence[float]) -> float:
    """Share of the places where two or more updates are not zero that they pull in opposite directions.

    An estimate from at most `SAMPLED_ROWS` x `SAMPLED_COLUMNS` evenly spaced places, so that no update is built for it.
    """
    rows, columns = (
        numpy.linspace(0, size - 1, min(size, most)).astype(int)
        for size, most in zip(updates[0].shape, (SAMPLED_ROWS, SAMPLED_COLUMNS), strict=True)
    )
    signs = numpy.stack(
        [numpy.sign(update.sample(rows, columns) * weight) for update, weight in zip(updates, weights, strict=True)]
    )
    votes = numpy.abs(signs).sum(0)
    contested = votes > 1
    agreed = numpy.abs(signs.sum(0)) == votes
    return float((contested & ~agreed).sum() / max(contested.sum(), 1))
