"""X-LoRA: what the gate weighs, in two passes, also under checkpointing; what is saved and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import IA3Config, LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from peftcli.errors import InputError

IDS = torch.tensor([[3, 5, 7, 1], [9, 3, 2, 5]])
NAMES = ["law", "medicine"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


def save_expert(folder: Path, seed: int, config: PeftConfig | None = None) -> str:
    config = config or LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = llama()
    torch.manual_seed(seed)
    get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    return {name: save_expert(tmp_path / "experts" / name, seed) for seed, name in enumerate(NAMES, 7)}


def gated(experts: dict[str, str], **options: Any) -> PeftModel:
    base = llama()
    torch.manual_seed(2)
    return get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", adapters=experts, **options)).eval()


def favour(model: PeftModel, logits: list[float]) -> None:
    """Make the gate predict the same logits everywhere."""
    with torch.no_grad():
        last = model.base_model.internal_xlora_classifier.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor(logits))


def loras(experts: dict[str, str], scales: list[float]) -> torch.Tensor:
    """Logits with both experts active, each update multiplied by a number."""
    model = PeftModel.from_pretrained(llama(), experts["law"], adapter_name="law")
    model.load_adapter(experts["medicine"], "medicine")
    model.set_adapter(NAMES)
    for _, layer in model.base_model.attached.layers():
        for name, scale in zip(NAMES, scales, strict=True):
            layer.set_scale(name, scale)
    return model.eval()(IDS).logits


def test_experts_are_weighed_as_the_gate_says(experts: dict[str, str]) -> None:
    model = gated(experts)
    favour(model, [0.0, 0.0])
    torch.testing.assert_close(model(IDS).logits, loras(experts, [0.5, 0.5]))
    favour(model, [1.0, 3.0])
    one, two = torch.softmax(torch.tensor([1.0, 3.0]), 0).tolist()
    torch.testing.assert_close(model(IDS).logits, loras(experts, [one, two]))
    model.set_global_scaling_weight(2.0)
    assert model.get_global_scaling_weight() == 2.0
    torch.testing.assert_close(model(IDS).logits, loras(experts, [2 * one, 2 * two]))
    model.set_global_scaling_weight(1.0)
    model.set_topk_lora(1)
    assert model.get_topk_lora() == 1
    torch.testing.assert_close(model(IDS).logits, loras(experts, [0.0, two]))
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


def test_softmax_over_the_best(experts: dict[str, str]) -> None:
    model = gated(experts, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)
    favour(model, [1.0, 3.0])
    torch.testing.assert_close(model(IDS).logits, loras(experts, torch.softmax(torch.tensor([1.0, 3.0]), 0).tolist()))
    model.set_topk_lora(1)
    torch.testing.assert_close(model(IDS).logits, loras(experts, [0.0, 1.0]))


def test_weights_differ_by_token_and_layer(experts: dict[str, str]) -> None:
    model = gated(experts, layerwise_scalings=True, xlora_depth=3, xlora_size=12)
    keys = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = "base_model.internal_xlora_classifier.layers"
    assert keys == {f"{inside}.{place}.{part}" for place in (0, 3, 6) for part in ("weight", "bias")}
    model(IDS)
    scalings = model.get_latest_scalings()
    assert scalings.shape == (2, 4, 4, 2)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 4, 4))
    assert scalings.std(1).min() > 0
    assert scalings.std(2).min() > 0


def test_the_first_pass_sees_the_experts_at_a_fixed_weight(experts: dict[str, str]) -> None:
    model = gated(experts)
    base = llama().model(IDS).last_hidden_state
    model(IDS)
    gate = model.base_model.internal_xlora_classifier
    torch.testing.assert_close(model.get_latest_scalings(), gate(base).detach())
    model.set_scaling_pass_value(None)
    assert gate.config.scaling_pass_value == 0.5
    model(IDS)
    assert not torch.allclose(model.get_latest_scalings(), gate(base).detach(), atol=1e-5)


def test_the_log_is_kept_on_request(experts: dict[str, str]) -> None:
    model = gated(experts)
    model(IDS)
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    for length in (4, 3, 4):
        model(IDS[:, :length])
    model.disable_scalings_logging()
    model(IDS)
    assert [tuple(scalings.shape) for scalings in model.get_scalings_log()] == [(2, n, 4, 2) for n in (4, 3, 4)]
    buckets = model.get_bucketed_scalings_log()
    assert {length: positions for length, (positions, _) in buckets.items()} == {4: [0, 2], 3: [1]}
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing(experts: dict[str, str], reentrant: bool, trainable: bool) -> None:
    """PEFT takes its hooks off before the backward pass, so that recomputed layers have no weights."""
    model = gated(experts, use_trainable_adapters=trainable, xlora_depth=2, xlora_dropout_p=0.0, scaling_pass_value=0.3)
    model.train()

    def gradients(call: Callable[[], Any]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (call().logits ** 2).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    embedded = model.get_input_embeddings()(IDS).detach()
    plain = gradients(lambda: model(IDS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(plain) == trained
    assert all(gradient.abs().max() > 1e-6 for gradient in plain.values())
    assert trainable == any("lora_A" in name for name in trained)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for call in (lambda: model(IDS), lambda: model(inputs_embeds=embedded)):
        for name, gradient in gradients(call).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-4, msg=name)


def test_saved_and_loaded_is_the_same(experts: dict[str, str], tmp_path: Path) -> None:
    model = gated(experts)
    model.save_pretrained(tmp_path / "gate")
    assert {path.name for path in (tmp_path / "gate").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.json",
    }
    with safe_open(tmp_path / "gate" / "adapter_model.safetensors", "pt") as file:
        assert all(key.startswith("base_model.internal_xlora_classifier.layers.") for key in file.keys())  # noqa: SIM118
    again = PeftModel.from_pretrained(llama(), tmp_path / "gate")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not [name for name, p in again.named_parameters() if p.requires_grad]
    moved = shutil.move(str(tmp_path / "experts"), str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="Can't find"):
        PeftModel.from_pretrained(llama(), tmp_path / "gate")
    given = {name: str(Path(moved) / name) for name in NAMES}
    again = PeftModel.from_pretrained(llama(), tmp_path / "gate", adapters=given)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_trained_experts_travel_with_their_gate(experts: dict[str, str], tmp_path: Path) -> None:
    model = gated(experts, use_trainable_adapters=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "gate")
    folder = shutil.move(str(tmp_path / "gate"), str(tmp_path / "moved"))
    again = PeftModel.from_pretrained(llama(), folder, is_trainable=True).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert any("lora_B" in name for name, p in again.named_parameters() if p.requires_grad)
    assert json.loads((Path(folder) / "law" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_generation_reads_the_whole_sequence_each_time(experts: dict[str, str]) -> None:
    model = gated(experts)
    told = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    sequence = IDS
    for _ in range(3):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(told, sequence)
    with pytest.raises(InputError, match="`use_cache` must be False"):
        model(IDS, use_cache=True)


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
def test_nothing_stays_behind(experts: dict[str, str], end: str) -> None:
    model = gated(experts)
    inner = model.get_base_model()
    assert not inner.config.use_cache
    assert list(model.peft_config) == ["default"]
    if end == "unload":
        model.unload()
    else:
        model.delete_adapter("default")
        assert not [name for name, _ in model.named_parameters() if "xlora" in name]
    assert inner.config.use_cache
    assert inner.generation_config.use_cache
    assert not inner._forward_pre_hooks
    assert not inner.get_input_embeddings()._forward_hooks
    assert torch.equal(inner(IDS).logits, llama()(IDS).logits)
    assert set(inner.state_dict()) == set(llama().state_dict())


def test_what_a_gate_can_not_do_is_refused(experts: dict[str, str]) -> None:
    model = gated(experts)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="XLORA adapters cannot be merged"):
            merge()
    with pytest.raises(InputError, match="decides what each row gets"):
        model(IDS, adapter_names=["law", "medicine"])
    with pytest.raises(InputError, match="must be the model's only adapter"):
        model.add_adapter("more", XLoraConfig(adapters=experts))
    with pytest.raises(InputError, match="its gate needs it"):
        model.delete_adapter("law")


@pytest.mark.parametrize(
    ("expert", "options", "problem"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), {}, "does not support LoRA layers with DoRA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), {}, "weighs LoRA only"),
        (None, {"hidden_size": 8}, "the model's is 16"),
        (None, {"top_k_lora": 3}, "is 3 of 2 adapters"),
        (None, {"enable_softmax_topk": True}, "needs `top_k_lora`"),
    ],
)
def test_experts_that_can_not_be_weighed_leave_no_trace(
    expert: PeftConfig | None, options: dict[str, Any], problem: str, experts: dict[str, str], tmp_path: Path
) -> None:
    if expert is not None:
        experts["odd"] = save_expert(tmp_path / "odd", 1, expert)
    base = llama()
    with pytest.raises(InputError, match=problem):
        get_peft_model(base, XLoraConfig(adapters=experts, **options))
    assert set(base.state_dict()) == set(llama().state_dict())
    assert base.config.use_cache
    assert torch.equal(base(IDS).logits, llama()(IDS).logits)
    with pytest.raises(InputError, match="names no LoRA"):
        get_peft_model(base, XLoraConfig())


def test_experts_get_the_gradients_peft_gives_them(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.13.0 trained experts whether asked or not; its gradients are those of `use_trainable_adapters`."""
    from golden import find, forward

    case = find(shared)["peft-0.13.0/xlora"]
    monkeypatch.chdir(case.folder)
    config = PeftConfig.from_pretrained(case.adapter)
    config.use_trainable_adapters = True
    model = PeftModel.from_pretrained(case.base(), case.adapter, is_trainable=True, config=config).eval()
    (forward(model, case.inputs()) ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(case.facts["grads"]) == len(gradients) == 18
    for name, (_, norm) in case.facts["grads"].items():
        ours = name.replace("base_model.lora_model.", "base_model.")
        assert gradients[ours].norm().item() == pytest.approx(norm, rel=1e-3), name


def test_a_recipe_names_experts_from_its_own_folder(tmp_path: Path) -> None:
    from peftcli.recipe.load import load_recipe

    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name_or_path: org/base}\ndata: {train: train.jsonl}\ntraining: {output_dir: out}\n"
        "adapter: {method: xlora, adapters: {near: ./law, far: org/medicine}}\n"
    )
    config = load_recipe(recipe, []).adapter.config
    assert isinstance(config, XLoraConfig)
    assert config.adapters == {"near": str(tmp_path / "law"), "far": "org/medicine"}
