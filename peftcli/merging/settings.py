"""What is asked of a merge, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from peftcli.errors import InputError, InputErrors, printable
from peftcli.merging.algebra import Rank
from peftcli.merging.operators import COMBINATION_TYPES, SVD_TYPES, SignMethod, checked_density

Space = Literal["delta", "factors"]


@dataclass(frozen=True)
class MergeSettings:
    """What is asked of a merge.

    Attributes:
        method: one of PEFT's combination types.
        weights: one for each adapter; 1 each where there are none.
        density: share of values kept, one for all adapters or one for each; needed by types that prune, refused elsewhere.
        majority_sign_method: see `operators.Settings`; `total` by default; refused by types that elect no sign.
        space: `delta` or `factors`.
        rank: rank of the result; by default see `default_rank`.
        seed: of DARE and of randomised decompositions.
    """

    method: str = "linear"
    weights: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    majority_sign_method: SignMethod | None = None
    space: Space = "delta"
    rank: Rank | None = None
    seed: int = 0

    @property
    def operator(self) -> str:
        """The operator on whole tensors; `cat` and `svd` are the sum there."""
        return SVD_TYPES.get(self.method, "linear" if self.method == "cat" else self.method)

    @property
    def prunes(self) -> bool:
        return self.operator != "linear"

    def resolved(self, count: int) -> MergeSettings:
        """The same with a weight and, where needed, a density for each of `count` adapters.

        Raises:
            InputErrors: naming every setting that does not fit.
        """
        problems = []
        if self.method not in COMBINATION_TYPES:
            problems.append(
                _setting(f"{printable(self.method)!r} is no method", "--method", ", ".join(COMBINATION_TYPES))
            )
        elif self.prunes and not self.density:
            problems.append(_setting(f"{self.method} needs a density", "--density", "0 to 1, e.g. 0.2"))
        else:
            problems += self._unused()
        if self.weights and len(self.weights) != count:
            problems.append(
                _setting(f"{len(self.weights)} weights for {count} adapters", "--weights", f"{count} numbers")
            )
        if len(self.density) not in (0, 1, count):
            problems.append(
                _setting(f"{len(self.density)} densities for {count} adapters", "--density", f"1 or {count}")
            )
        if self.majority_sign_method not in (None, "total", "frequency"):
            problems.append(_setting("is no sign method", "--majority-sign-method", "total, frequency"))
        for density in self.density:
            try:
                checked_density(density)
            except InputError as error:
                problems.append(error)
        if problems:
            raise InputErrors(problems)
        densities = self.density * count if len(self.density) == 1 else self.density
        return replace(
            self,
            weights=self.weights or (1.0,) * count,
            density=densities,
            majority_sign_method=(self.majority_sign_method or "total") if "ties" in self.method else None,
        )

    def _unused(self) -> list[InputError]:
        """Settings that the method does not look at."""
        unused = {
            "--density": self.density and not self.prunes,
            "--majority-sign-method": self.majority_sign_method and "ties" not in self.method,
        }
        return [InputError(f"means nothing for {self.method}", field=field) for field in unused if unused[field]]


def _setting(problem: str, field: str, allowed: str) -> InputError:
    return InputError(problem, field=field, allowed=allowed)
