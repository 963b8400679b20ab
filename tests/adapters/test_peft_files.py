"""Files as PEFT writes them where its config says one thing and its tensors another. Each reference is computed here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training.tiny import disturbed, tiny_llama

from peftcli import GloraConfig, LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(12).reshape(2, 6)


class Net(nn.Module):
    """Tokens, attention, a layer, and a table whose name says bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(16, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.place_bias = nn.Embedding(6, 8)
        self.lin = nn.Linear(8, 8)
        nn.init.normal_(self.mha.in_proj_bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.lin(self.mha(x, x, x)[0] + self.place_bias(torch.arange(ids.shape[1])))


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"inference_mode": True, **config}))
    return folder


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_an_embedding_never_starts_from_the_base(init: str, tmp_path: Path) -> None:
    """PEFT has no such start for embeddings: a file that asks for one holds plain A and B and an untouched base."""
    base = Net()
    a, b = torch.randn(2, 16), torch.randn(8, 2)
    expected = copy.deepcopy(base)
    expected.words.weight.data += (b @ a).T * (6 / 2)
    tensors = {"words.lora_embedding_A": a, "words.lora_embedding_B": b}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["words"], "init_lora_weights": init}
    model = PeftModel.from_pretrained(copy.deepcopy(base), write(tmp_path / "peft", tensors, **settings))
    torch.testing.assert_close(model(IDS), expected(IDS))
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["init_lora_weights"] is True
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    r, scaling = 4, 12 / 4
    update = stored["base_model.model.words.lora_embedding_B"] @ stored["base_model.model.words.lora_embedding_A"]
    assert stored["base_model.model.words.lora_embedding_A"].shape == (r, 16)
    torch.testing.assert_close(update * scaling, b @ a * 3)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(IDS), expected(IDS))


def test_all_biases_are_the_parameters_called_bias() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin"], bias="all"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {f"base_model.model.{name}.bias" for name in ("mha.out_proj", "lin.base_layer")}


def test_a_file_of_peft_0_13_may_hold_more_biases(tmp_path: Path) -> None:
    """There, everything with `bias` in its name is trained and stored."""
    base = Net()
    expected = copy.deepcopy(base)
    more = {"mha.in_proj_bias": "mha.in_proj_bias", "place_bias.weight": "place_bias.weight"}
    more |= {"mha.out_proj.bias": "mha.out_proj.bias", "lin.base_layer.bias": "lin.bias"}
    tensors = {key: torch.randn_like(expected.get_parameter(name)) for key, name in more.items()}
    for key, name in more.items():
        expected.get_parameter(name).data.copy_(tensors[key])
    tensors |= {"lin.lora_A.weight": torch.randn(2, 8), "lin.lora_B.weight": torch.zeros(8, 2)}
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["lin"], "bias": "all"}
    folder = write(tmp_path / "peft", tensors, **settings)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    torch.testing.assert_close(model(IDS), expected(IDS))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "place_bias" in name}
    model.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {key: tensor.tolist() for key, tensor in stored.items()} == {
        f"base_model.model.{key}": tensor.tolist() for key, tensor in tensors.items()
    }
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), Net()(IDS))


def test_hira_follows_its_file_where_peft_forgets_the_pattern(tmp_path: Path) -> None:
    base = Net()
    a, b = torch.randn(3, 8), torch.randn(8, 3)
    expected = copy.deepcopy(base)
    expected.lin.weight.data *= 1 + b @ a
    settings = {"peft_type": "HIRA", "r": 3, "target_modules": ["lin"], "rank_pattern": {"lin": 2}}
    folder = write(tmp_path / "peft", {"lin.hira_A": a, "lin.hira_B": b}, **settings)
    torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(IDS), expected(IDS))


def test_modules_to_save_are_found_by_their_ending(tmp_path: Path) -> None:
    """Letter by letter, as in PEFT: `norm` is every module whose name ends with it."""
    base = tiny_llama()
    model = disturbed(
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    )
    norms = {f"base_model.model.{path}.weight" for path, _ in base.named_modules() if path.endswith("norm")}
    assert len(norms) == 2 * len(base.model.layers) + 1
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in stored if "lora_" not in key} == norms
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("bias", ["glora_only", "all"])
def test_a_method_that_changes_a_trained_bias_merges_it(bias: str) -> None:
    model = disturbed(get_peft_model(Net(), GloraConfig(target_modules=["lin"], r=2, bias=bias, init_weights=False)))
    expected = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), Net()(IDS))
    torch.testing.assert_close(model(IDS), expected)
    model.merge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(IDS), expected)


class Grouped(nn.Module):
    """A convolution of two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("groups", [2, 1], ids=["today", "0.13"])
def test_a_grouped_convolution_as_peft_adapts_it(groups: int, tmp_path: Path) -> None:
    """A reads the channels of all groups; B is grouped, or not in files of PEFT 0.13."""
    base, x = Grouped(), torch.randn(2, 4, 7, 7)
    a, b = torch.randn(2, 4, 3, 3), torch.randn(6, 2 // groups, 1, 1)
    update = nn.functional.conv2d(nn.functional.conv2d(x, a, stride=2, padding=1), b, groups=groups)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["conv"]}
    tensors = {"conv.lora_A.weight": a, "conv.lora_B.weight": b}
    expected = base(x) + 3 * update
    model = PeftModel.from_pretrained(base, write(tmp_path / "peft", tensors, **settings))
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {key: t.shape for key, t in stored.items()} == {f"base_model.model.{k}": t.shape for k, t in tensors.items()}
    torch.testing.assert_close(PeftModel.from_pretrained(Grouped(), tmp_path / "ours")(x), expected)
    with pytest.raises(ValueError, match="conv: Merging is not supported for a convolution with groups > 1"):
        model.merge_adapter()


def test_a_fresh_adapter_of_a_grouped_convolution_has_pefts_shapes_where_it_can() -> None:
    def shapes(**options: Any) -> list[tuple[int, ...]]:
        model = get_peft_model(Grouped(), LoraConfig(target_modules=["conv"], **options))
        return [tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name and "magnitude" not in name]

    assert shapes(r=4) == [(4, 4, 3, 3), (6, 2, 1, 1)]
    within = [(3, 2, 3, 3), (6, 3, 1, 1)]  # PEFT refuses what follows: the update is a part of the weight, and merges
    assert shapes(r=3) == shapes(r=3, init_lora_weights="olora") == shapes(r=3, use_dora=True) == within


@pytest.mark.parametrize("version", ["0.13", "today"])
def test_a_pattern_means_what_it_meant_to_the_version_that_wrote_it(version: str, tmp_path: Path) -> None:
    """To 0.13 the rank's key `lin` hides the alpha's; `lin|words` is `lin`, or `words` at the very end."""
    base = Net()
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    alpha = 16 if version == "today" else 4
    expected = copy.deepcopy(base)
    expected.lin.weight.data += b @ a * (alpha / 2)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": ["lin"]}
    settings |= {"rank_pattern": {"lin": 2}, "alpha_pattern": {"lin|words": 16}}
    settings |= {"exclude_modules": None} if version == "today" else {}
    tensors = {"lin.lora_A.weight": a, "lin.lora_B.weight": b}
    model = PeftModel.from_pretrained(base, write(tmp_path / "peft", tensors, **settings))
    torch.testing.assert_close(model(IDS), expected(IDS))
    model.save_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (stored["rank_pattern"], stored["alpha_pattern"]) == ({"lin": 2}, {"lin": alpha})  # one meaning for both
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "ours")(IDS), expected(IDS))


def test_patterns_are_stored_in_their_order(tmp_path: Path) -> None:
    """The first that matches counts; sorted, another one would."""
    config = LoraConfig(target_modules=["lin"], rank_pattern={"lin": 2, ".*": 3}, alpha_pattern={"l.n": 6, ".*": 3})
    model = disturbed(get_peft_model(Net(), config))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(IDS), model(IDS))
    assert dict(again.base_model.model.lin.scaling) == {"default": 3.0}
