"""Updates of one module as matrices, and how a sum of them comes back to a product of two small ones.

An update known by its factors is never built: for B = Q_b R_b and A^T = Q_a R_a the singular values of B A are those of
R_b R_a^T, a matrix as small as the rank. An update known only as a matrix is decomposed exactly where it is small, and
by randomised range finding (Halko et al. 2011, arXiv 0909.4061) where it is not; what that loses is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

EXACT_SIZE = 768
"""Up to this many rows or columns a matrix is decomposed exactly: seconds at most."""
OVERSAMPLING, POWER_STEPS = 16, 2
NEGLIGIBLE = 1e-10
"""Singular values below this share of the largest are rounding: float64 has 1e-16."""
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class LowRank:
    """B A.

    Attributes:
        a: [r, in], float64.
        b: [out, r], float64, the scaling in it.
    """

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> Tensor:
        return self.b.float() @ self.a.float()

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the product."""
        return (self.b[index] @ self.a).float()

    def norm(self) -> float:
        return max(inner(self, self), 0.0) ** 0.5


@dataclass(frozen=True)
class Dense:
    """A matrix [out, in], float32, that is no product of small ones as far as we know.

    Attributes:
        matrix: the update.
        rank: the rank to give it where none is asked for: the method's own, or a usual one.
    """

    matrix: Tensor
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        return self.matrix

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index]

    def norm(self) -> float:
        return float(torch.linalg.norm(self.matrix))


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


def stack(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Sum of w_i B_i A_i, exactly: factors side by side."""
    a = torch.cat([update.a for update in updates])
    return LowRank(a, torch.cat([weight * update.b for update, weight in zip(updates, weights, strict=True)], dim=1))


def inner(first: Update, second: Update) -> float:
    """Frobenius inner product; of two products without building either."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return float(((first.b.T @ second.b) * (first.a @ second.a.T)).sum())
    if isinstance(first, Dense):
        first, second = second, first
    assert isinstance(second, Dense)
    if isinstance(first, LowRank):
        return float((first.b * (second.matrix @ first.a.T.float())).sum())
    return float((first.matrix * second.matrix).sum(dtype=torch.float64))


def compress(update: Update, rank: Rank, generator: Generator) -> Compressed:
    """The best product of a rank to stand for an update. `Rank()` drops only what is rounding.

    Args:
        generator: randomness of the decomposition of large matrices.
    """
    u, s, vh = _thin_svd(update) if isinstance(update, LowRank) else _matrix_svd(update.matrix, rank, generator)
    is_whole = isinstance(update, LowRank) or len(s) == min(update.shape)
    total = float((s.double() ** 2).sum()) if is_whole else update.norm() ** 2
    count = _count(s, total, rank)
    factors = LowRank(vh[:count].double(), (u[:, :count] * s[:count]).double())
    kept = float((s[:count].double() ** 2).sum())
    return Compressed(factors, min(kept / total, 1.0) if total > 0 else 1.0, total**0.5)


def _thin_svd(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    q_b, r_b = torch.linalg.qr(update.b)
    q_a, r_a = torch.linalg.qr(update.a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def _matrix_svd(matrix: Tensor, rank: Rank, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    size = min(matrix.shape)
    wanted = size if rank.number is None else rank.number + OVERSAMPLING
    if size <= EXACT_SIZE or wanted * 3 >= size:
        return torch.linalg.svd(matrix, full_matrices=False)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], wanted, generator=generator))[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _count(s: Tensor, total: float, rank: Rank) -> int:
    """How many singular values to keep; one at least, so that factors have a shape."""
    count = int((s > NEGLIGIBLE * s[:1]).sum()) if len(s) else 0
    if rank.energy is not None and total > 0:
        reached = torch.cumsum(s.double() ** 2, 0) >= rank.energy * total
        count = min(count, int(reached.int().argmax()) + 1 if bool(reached.any()) else len(s))
    if rank.number is not None:
        count = min(count, rank.number)
    return max(count, 1)


def sign_conflicts(updates: Sequence[Update], weights: Sequence[float]) -> float:
    """Share of the places where two or more updates are not zero that they pull in opposite directions.

    Counted on evenly spaced rows: a share over thousands of places is known well enough, and no update is built for it.
    """
    out = updates[0].shape[0]
    index = torch.linspace(0, out - 1, min(out, SAMPLED_ROWS)).long()
    signs = [
        update.rows(index).sign() * (1 if weight >= 0 else -1) for update, weight in zip(updates, weights, strict=True)
    ]
    votes = torch.stack([sign.abs() for sign in signs]).sum(0)
    contested = votes > 1
    agreed = torch.stack(signs).sum(0).abs() == votes
    return float((contested & ~agreed).sum() / contested.sum().clamp_min(1))
