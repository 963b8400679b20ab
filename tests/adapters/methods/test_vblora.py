"""VB-LoRA: one bank for all modules, and the small file that holds the chosen vectors only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftcli import PeftModel, VBLoRAConfig, get_peft_model, set_peft_model_state_dict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def config(**options: object) -> VBLoRAConfig:
    settings = {"r": 3, "num_vectors": 12, "vector_length": 2, "topk": 3, "init_vector_bank_bound": 1.0, **options}
    return VBLoRAConfig(target_modules=["first", "second"], **settings)


def test_all_modules_use_one_bank_and_adapters_have_their_own() -> None:
    model = get_peft_model(Net(), config())
    model.add_adapter("other", config())
    base = model.base_model.model
    bank = base.first.vblora_vector_bank
    assert bank["default"] is base.second.vblora_vector_bank["default"]
    assert not torch.equal(bank["default"], bank["other"])


@pytest.mark.parametrize("count", [12, 300])
def test_top_k_file_is_small_and_gives_the_same_model(count: int, tmp_path: Path) -> None:
    model, x = get_peft_model(Net(), config(num_vectors=count, save_only_topk_weights=True)).eval(), torch.randn(3, 10)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    chosen = tensors["base_model.model.first.vblora_logits_A_topk_indices"]
    assert (chosen.shape, chosen.dtype) == ((3, 5, 3), torch.uint8 if count < 256 else torch.int16)
    assert tensors["base_model.model.first.vblora_logits_A_topk_weights"].shape == (3, 5, 2)
    assert not [key for key in tensors if key.endswith(("logits_A", "logits_B"))]
    again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-5)
    again.save_pretrained(tmp_path / "again")
    for key, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[key])
    tensors["base_model.model.first.vblora_logits_A_topk_indices"][0, 0, 0] = count
    with pytest.raises(ValueError, match="outside of the bank"):
        set_peft_model_state_dict(again, tensors)
    with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
        again.train()(x)


def test_vector_length_must_divide_both_sides() -> None:
    base = Net()
    with pytest.raises(ValueError, match="`out_features` 20 must be divisible by `vector_length` 3"):
        get_peft_model(base, config(vector_length=3))
    assert set(base.state_dict()) == set(Net().state_dict())
