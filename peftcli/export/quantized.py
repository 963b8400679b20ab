"""The base an adapter was trained on in 4 or 8 bits: its weights as training saw them, rounded and expanded again.

What the rounding was is read from the run's own `recipe.yaml` beside the adapter. Nothing is stored in 4 bits: rounding
the merged weight once more would lose nearly all of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError
from peftcli.lazy import torch
from peftcli.names import RECIPE

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.recipe.schema import Recipe

BLOCK_SIZE = 64  # bitsandbytes' default, which transformers takes
CHOICES = ("original", "dequantized")


@dataclass(frozen=True)
class Rounding:
    """How a base was quantised.

    Attributes:
        names: the weights that were, by their name in the model.
        settings: the recipe's quantization section.
        dtype: torch's name of the dtype the base was loaded in; None is the checkpoint's.
    """

    names: frozenset[str]
    settings: Any
    dtype: str | None

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight as the quantised base computes with it, in its own dtype."""
        import bitsandbytes.functional as F

        loaded = weight if self.dtype is None else weight.to(getattr(torch, self.dtype))
        if self.settings.load_in_8bit:
            codes, scales, _ = F.int8_vectorwise_quant(loaded.half())
            return (codes.float() * scales[:, None] / 127).to(weight.dtype)
        codes, state = F.quantize_4bit(
            loaded.contiguous(),
            blocksize=BLOCK_SIZE,
            compress_statistics=self.settings.bnb_4bit_use_double_quant,
            quant_type=self.settings.bnb_4bit_quant_type,
        )
        return F.dequantize_4bit(codes, state).to(weight.dtype)


def choose_rounding(adapter: Path, base: Path, choice: str | None) -> Rounding | None:
    """What to merge into: the base as it is (None), or as training saw it.

    Args:
        adapter: its folder, in or above which the run's recipe lies.
        base: the unquantised base model's folder.
        choice: `original` or `dequantized`; needed for an adapter of a quantised base, since both are defensible.

    Raises:
        InputError: if the choice is missing, or there is no record of how the base was quantised.
    """
    if choice not in (None, *CHOICES):
        raise InputError(f"{choice!r} is no base", field="--quantized-base", allowed=", ".join(CHOICES))
    recipe = _recorded(adapter)
    if choice is None and recipe is not None:
        raise InputError(
            "was trained on a quantised base, so it must be said what to merge it into",
            place=adapter,
            field="--quantized-base",
            allowed="original (the weights as published), dequantized (as training saw them)",
        )
    if choice != "dequantized":
        return None
    if recipe is None:
        raise InputError(
            f"no {RECIPE} with a quantization section says how the base was quantised",
            place=adapter,
            field="--quantized-base",
            allowed="original",
        )
    dtype = None if recipe.model.dtype == "auto" else recipe.model.dtype
    return Rounding(_quantized_weights(recipe, base), recipe.quantization, dtype)


def _recorded(adapter: Path) -> Recipe | None:
    """The recipe of the run that made the adapter, if it quantised the base."""
    from peftcli.recipe.load import load_recipe

    for folder in (adapter, adapter.resolve().parent):
        if (folder / RECIPE).is_file():
            recipe = load_recipe(folder / RECIPE, check_paths=False)
            return recipe if recipe.quantization is not None else None
    return None


def _quantized_weights(recipe: Recipe, base: Path) -> frozenset[str]:
    """The linear layers transformers quantises: all but the heads and what the recipe leaves out."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from peftcli.training.model import meta_base

    assert recipe.quantization is not None
    model = meta_base(recipe.model.model_copy(update={"name_or_path": str(base), "revision": None}))
    left_out = [*get_keys_to_not_convert(model), *(recipe.quantization.llm_int8_skip_modules or [])]
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, left_out)
    )
