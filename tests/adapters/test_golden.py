"""Adapters made by real PEFT (0.13.0 and 0.21.2) load, compute, differentiate, merge and are written back the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from golden import Golden, find, forward

from peftcli import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peftcli.adapters.checkpoint import read_tensors
from peftcli.adapters.registry import METHODS, config_class
from peftcli.errors import InputError

SHARED = Path(os.environ.get("PEFTCLI_SHARED", Path(__file__).parents[3] / "shared")).resolve()
CASES = find(SHARED) or {"none": None}

UNSUPPORTED = {}
"""Variants of LoRA we do not have, and the field a refusal must name."""

WRONG_GRADIENTS = {"C3A": ".layers.0."}
"""By method, the tensors PEFT gives a wrong gradient. C3A's backward pass turns what goes on to earlier layers around:
see test_c3a."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed"),
]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Golden:
    found = CASES[request.param]
    if found is None:
        pytest.skip(f"no golden adapters at {SHARED}")
    return found


def peft_type(case: Golden) -> str:
    return json.loads((case.adapter / "adapter_config.json").read_text())["peft_type"]


def load(case: Golden, base: torch.nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(base, case.adapter, is_trainable=trainable(case), allow_pickle=True).eval()


def trainable(case: Golden) -> bool:
    """Prompt methods load for inference only, as in PEFT."""
    return not config_class(peft_type(case)).is_prompt_learning


def test_golden(case: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits 2e-5, merged logits 1e-4, gradients 1e-3: the tolerances of the golden set's README."""
    monkeypatch.chdir(case.folder)  # X-LoRA's config names its experts from there
    if case.folder.name in UNSUPPORTED or peft_type(case) not in METHODS:
        with pytest.raises(InputError, match=UNSUPPORTED.get(case.folder.name, "unknown method")):
            load(case, case.base())
        return
    inputs, expected = case.inputs(), case.expected()
    model = load(case, case.base())
    logits = forward(model, inputs)
    torch.testing.assert_close(logits, expected["logits"], atol=2e-5, rtol=0)

    if trainable(case):
        check_gradients(case, model, inputs)
    elif (learner := prompt_learner(case)) is not None:
        check_gradients(case, learner, inputs)

    check_saved(case, model, logits, inputs, tmp_path)
    check_merged(case, model, logits, inputs, expected)


def check_gradients(case: Golden, model: PeftModel, inputs: dict) -> None:
    (forward(model, inputs) ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # PEFT keeps only the active LLaMA-Adapter in the model, under a name without the adapter's.
    gradients |= {name.removesuffix(".default"): grad for name, grad in gradients.items() if "adaption_" in name}
    for name, (total, norm) in case.facts["grads"].items():
        if peft_type(case) == "XLORA" and "lora_model" in name:
            continue  # 0.13.0 trains frozen experts by mistake: see test_xlora
        assert name in gradients, f"{name} gets no gradient"
        if WRONG_GRADIENTS.get(peft_type(case), "none") in name:
            continue
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
        assert gradients[name].sum().item() == pytest.approx(total, rel=1e-3, abs=1e-3 * norm + 1e-7), name


def prompt_learner(case: Golden) -> PeftModel | None:
    """A fresh prompt set to the file's. None where the file lacks the network that makes the prompt: only logits count."""
    config = PeftConfig.from_pretrained(case.adapter)
    config.inference_mode = False
    model = get_peft_model(case.base(), config).eval()
    if not model.prompt_encoder["default"].method.is_plain:
        return None
    set_peft_model_state_dict(model, read_tensors(case.adapter))
    return model


def check_saved(case: Golden, model: PeftModel, logits: torch.Tensor, inputs: dict, folder: Path) -> None:
    """Written back: the same keys and shapes, and the same logits when loaded again."""
    from safetensors import safe_open

    model.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        written = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    if "tensors" in case.facts:  # a .bin lists none
        told = {key: shape for key, (_, shape) in case.facts["tensors"].items()}
        assert written == {key: shape for key, shape in told.items() if not repeated(key, told)}
    again = PeftModel.from_pretrained(case.base(), folder).eval()
    torch.testing.assert_close(forward(again, inputs), logits, atol=1e-6, rtol=0)


def repeated(key: str, all_keys: Iterable[str]) -> bool:
    """Whether PEFT stores a tensor at a module although it also stands in the file once for all of them (RandLoRA)."""
    return key.startswith("base_model.model.") and f"base_model.{key.rpartition('.')[2]}" in all_keys


def check_merged(case: Golden, model: PeftModel, logits: torch.Tensor, inputs: dict, expected: dict) -> None:
    """HF's merged logits where they can be trusted; always: merged = adapted, or refused with a reason."""
    if not trainable(case):
        assert not hasattr(model, "merge_and_unload")  # as in PEFT
        return
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        assert "merge" in str(error).lower()
        assert case.facts["trust"]["merge"] != "ok"
        return
    result = forward(merged, inputs)
    torch.testing.assert_close(result, logits, atol=1e-4, rtol=0)
    if case.facts["trust"]["merge"] == "ok":
        torch.testing.assert_close(result, expected["merged_logits"], atol=1e-4, rtol=0)
