"""The custom-model examples of PEFT's documentation: a multilayer perceptron and a convolutional network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftcli import LoraConfig, PeftModel, get_peft_model


class MLP(nn.Module):
    """As in the guide: 20 features, one hidden layer of 64, two classes."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seq = nn.Sequential(
            nn.Linear(20, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class Block(nn.Module):
    """Like a stage of a timm model: convolutions and a feed-forward part with `fc1`, `fc2`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(8)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList([Block()])
        self.head = nn.ModuleDict({"fc": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.stages[0](x)).log_softmax(-1)


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(256, *shape, generator=torch.Generator().manual_seed(1))
    return x, (x.flatten(1).sum(1) > x.flatten(1).sum(1).median()).long()


CASES = {
    "mlp": (MLP, LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"]), rows(20)),
    "mlp by expression": (MLP, LoraConfig(target_modules=r"seq\.[02]", modules_to_save=["seq.4"]), rows(20)),
    "convolutions": (
        ConvNet,
        LoraConfig(target_modules=r".*\.(mlp\.fc\d|conv)", modules_to_save=["head.fc", "norm"]),
        rows(3, 6, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    build, config, (x, y) = CASES[name]
    model = get_peft_model(build(), copy.deepcopy(config))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
    assert ((model(x).argmax(1) == y).float().mean()) > 0.85
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items()), "the base is untouched"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(again(x), model.eval()(x)), "batch norm's statistics are stored with the module"
    torch.testing.assert_close(again.merge_and_unload()(x), model(x), atol=1e-5, rtol=1e-4)
