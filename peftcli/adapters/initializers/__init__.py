"""LoRA's starting points that are taken out of the base weight.

PiSSA and OLoRA start from a part B0 A0 of the base and train W - s B0 A0 + s B A. PEFT writes W - s B0 A0 over the base;
then a second adapter, a reload or a switch to the bare base is wrong. Here the base stays as it is and the start is kept
beside A and B, frozen and subtracted: the same function, and saved as the plain LoRA [A; A0], [B, -B0] of rank 2 r that
any PEFT loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def takes_start_from_base(init: bool | str) -> bool:
    """Whether this `init_lora_weights` starts from a part of the base weight."""
    return isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "lora_ga"))


def start_factors(init: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] in float32, such that s B0 A0 is the part of the weight the adapter starts from.

    Args:
        init: `pissa`, `pissa_niter_<n>` or `olora`.
        weight: base weight [out, in]; fp32, fp16 or bf16.
        r: rank.
        scaling: LoRA's s.

    Raises:
        InputError: for a weight of another precision, or a rank larger than the weight's.
    """
    from peftcli.adapters.initializers.olora import olora
    from peftcli.adapters.initializers.pissa import pissa

    if not weight.is_floating_point() or weight.element_size() == 1:
        raise InputError(
            f"Please initialize {init} under float32, float16, or bfloat16, not {weight.dtype}. "
            "Subsequently, re-quantize the residual model to help minimize quantization errors.",
            field="init_lora_weights",
        )
    require_rank(init, r, weight)
    weight = weight.float()
    if init == "olora":
        return olora(weight, r, scaling)
    iterations = int(init.rpartition("_")[2]) if init != "pissa" else None
    return pissa(weight, r, scaling, iterations)


def require_rank(init: str, r: int, weight: Tensor) -> None:
    """Refuse a rank larger than the weight's: there are no more directions to start from.

    Raises:
        InputError: naming both.
    """
    if r > min(weight.shape):
        raise InputError(f"{init} of rank {r} on a weight of shape {list(weight.shape)}", field="r")
