"""Norms and singular values of an adapter's updates, without building them.

For dW = s B A with B = Q_b R_b and A^T = Q_a R_a, the singular values of dW are those of s R_b R_a^T, an r x r matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

from peftcli.adapters.audit import Audit
from peftcli.adapters.base import LowRankAdapter
from peftcli.adapters.fit import Fit, Found
from peftcli.adapters.values import read_array
from peftcli.files import open_regular
from peftcli.lazy import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENERGY = 0.99


def spectrum_rows(audit: Audit) -> list[dict[str, Any]]:
    """For each module whose update is a product of two factors: its norm, effective rank and largest singular value.

    `effective_rank` is exp of the entropy of the normalised singular values (Roy & Vetterli 2007); `rank_99` the number
    of singular values that hold 99 % of the energy.
    """
    rows = []
    with open_regular(audit.file.path) as file:
        for path, fit in audit.modules.items():
            factors = _factors(file, fit, audit.found[path])
            if factors is not None:
                values = singular_values(*factors) * abs(fit.adapter.scaling)
                rows.append({"module": path, "r": len(values), **describe(values)})
    return rows


def norm_rows(audit: Audit) -> list[dict[str, Any]]:
    """The Frobenius norm of each tensor of each module, and of the update where it is a product of two factors."""
    updates = {row["module"]: row["norm"] for row in spectrum_rows(audit)}
    rows = []
    with open_regular(audit.file.path) as file:
        for path, found in audit.found.items():
            norms = {name: float(numpy.linalg.norm(read_array(file, tensor))) for name, tensor in found.items()}
            rows.append({"module": path, "update": updates.get(path), "tensors": norms})
    return rows


def singular_values(a: NDArray[numpy.float64], b: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Singular values of B A for A [r, in] and B [out, r], largest first."""
    right: Any = numpy.linalg.qr(a.T, mode="r")
    left: Any = numpy.linalg.qr(b, mode="r")
    return numpy.linalg.svd(left @ right.T, compute_uv=False)


def describe(values: NDArray[numpy.float64]) -> dict[str, float]:
    """Norm and effective ranks of a spectrum; all zero for an update that is zero."""
    total = float(values.sum())
    if total == 0:
        return {"norm": 0.0, "largest": 0.0, "effective_rank": 0.0, "rank_99": 0}
    shares = values[values > 0] / total
    energy = numpy.cumsum(values**2) / (values**2).sum()
    return {
        "norm": float(numpy.sqrt((values**2).sum())),
        "largest": float(values[0]),
        "effective_rank": float(numpy.exp(-(shares * numpy.log(shares)).sum())),
        "rank_99": int(numpy.searchsorted(energy, ENERGY) + 1),
    }


def _factors(file: BinaryIO, fit: Fit, found: Found) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """A [r, in] and B [out, r] of a module whose update is their product and nothing else (DoRA's needs the base)."""
    is_product = getattr(type(fit.adapter), "delta", None) is LowRankAdapter.delta
    matrices = [name for name, spec in fit.specs.items() if len(spec.shape) > 1]
    if not is_product or len(matrices) != 2 or not all(name in found for name in matrices):
        return None
    a, b = (read_array(file, found[name]).astype("f8") for name in matrices)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return (a, b) if len(a) == b.shape[1] else None
