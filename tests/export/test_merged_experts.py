"""Adapted experts merged into a base's files: whatever the checkpoint's layout, as the model in memory is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging.lab import load, load_base, logits, save_adapter
from merging.mixtures import EXPERTS, KINDS, PATTERNS, save_mixture

from peftcli import PeftModel
from peftcli.errors import InputError
from peftcli.export.merged import export_merged


@pytest.mark.parametrize(
    "fields",
    [{"target_parameters": EXPERTS, **PATTERNS}, {"target_parameters": EXPERTS[1:], "use_rslora": True}],
    ids=["both", "down"],
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "granitemoe"])
def test_as_the_model_is_merged(tmp_path: Path, kind: str, fields: dict) -> None:
    base = save_mixture(tmp_path / "base", kind)
    save_adapter(tmp_path / "a", base, r=2, lora_alpha=3, target_modules=["o_proj"], **fields)
    made = export_merged([tmp_path / "a"], base, tmp_path / "m")
    adapted = load(base, tmp_path / "a")
    assert (logits(adapted) - logits(load_base(base))).abs().max() > 0.1
    torch.testing.assert_close(logits(load_base(tmp_path / "m")), logits(adapted), atol=2e-5, rtol=0)
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in load_base(tmp_path / "m").state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)
    assert made.changed > 2


def test_two_adapters_in_another_precision(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "mixtral", torch.bfloat16)
    for seed in range(2):
        save_adapter(tmp_path / f"{seed}", base, r=2, target_modules=[], target_parameters=EXPERTS[seed:], seed=seed)
    export_merged([tmp_path / "0", tmp_path / "1"], base, tmp_path / "m", dtype="float32")
    model = load_base(base).float()
    for seed in range(2):
        model = PeftModel.from_pretrained(model, tmp_path / f"{seed}").merge_and_unload()
    torch.testing.assert_close(logits(load_base(tmp_path / "m")), logits(model), atol=2e-5, rtol=0)


def test_layouts_we_do_not_know_are_refused(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "granitemoe")
    save_adapter(tmp_path / "a", base, r=2, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj of 3 x 24 x 16"):
        export_merged([tmp_path / "a"], base, tmp_path / "m")
    assert not (tmp_path / "m").exists()
