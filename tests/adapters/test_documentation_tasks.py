"""What PEFT's task guides do, on tiny models, with nothing but the import changed: a test a guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.optim import AdamW
from torch.utils.data import DataLoader

from peftcli import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForTokenClassification,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*resume_download:FutureWarning")

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}


def saved_base(folder: Path, model: hf.PreTrainedModel) -> str:
    """A base as a user has one: in a folder."""
    model.save_pretrained(folder / "base")
    return str(folder / "base")


def train(model: PeftModel, batch: dict[str, torch.Tensor], steps: int = 12) -> None:
    """The guides' loop; the loss must fall."""
    optimizer = AdamW(model.parameters(), lr=3e-2)
    scheduler = hf.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=4 * steps)
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    losses = []
    model.train()
    for _ in range(steps):
        for part in DataLoader(rows, batch_size=len(rows)):
            loss = model(**part).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]


IDS = torch.tensor([[5, 8, 13, 21], [6, 7, 30, 31]])
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", prompt_tuning_init=PromptTuningInit.RANDOM, num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    ],
    ids=["prompt", "prefix", "projected prefix", "p-tuning"],
)
def test_prompts_for_a_language_model(config: PeftConfig, tmp_path: Path) -> None:
    """BLOOM learns a label's text and is loaded for inference with its base's name."""
    torch.manual_seed(0)
    base = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2))
    name = saved_base(tmp_path, base)
    model = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(name), config)
    model.print_trainable_parameters()
    train(model, TEXT)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    options = {"max_new_tokens": 4, "eos_token_id": 3, "pad_token_id": 3, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


def test_ia3_for_an_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = saved_base(tmp_path, hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)))
    model = get_peft_model(hf.AutoModelForSeq2SeqLM.from_pretrained(name), IA3Config(task_type="SEQ_2_SEQ_LM"))
    train(model, {**TEXT, "labels": IDS[:, :2]})
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    options = {"input_ids": IDS[:1], "max_new_tokens": 4}
    assert torch.equal(loaded.generate(**options), model.generate(**options))


def test_multitask_prompts_take_the_rows_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0))
    config = MultitaskPromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_tasks=2, num_virtual_tokens=4, num_transformer_submodules=1
    )
    train(get_peft_model(base, config), {**TEXT, "task_ids": torch.tensor([0, 1])})


@pytest.mark.parametrize("kind", ["image", "segmentation"])
def test_lora_on_vision_with_its_head_trained(kind: str, tmp_path: Path) -> None:
    """`modules_to_save` names the new head; no task type, so `AutoPeftModel` finds the class by itself."""
    torch.manual_seed(0)
    if kind == "image":
        base: Any = hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, **HEADS, num_labels=3))
        batch = {"pixel_values": torch.rand(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
        head = "classifier"
    else:
        sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [2], "hidden_sizes": [16], "patch_sizes": [3]}
        config = hf.SegformerConfig(
            **sizes, strides=[2], num_attention_heads=[2], mlp_ratios=[2], decoder_hidden_size=16, num_labels=3
        )
        base = hf.SegformerForSemanticSegmentation(config)
        batch = {"pixel_values": torch.rand(2, 3, 16, 16), "labels": torch.randint(0, 3, (2, 16, 16))}
        head = "decode_head"
    name = saved_base(tmp_path, base)
    base = type(base).from_pretrained(name)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]  # transformers 5 renamed them on its way
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=targets, lora_dropout=0.1, bias="none", modules_to_save=[head])
    model = get_peft_model(base, lora)
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.auto_mapping["base_model_class"] == type(base).__name__
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    pixels = batch["pixel_values"]
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_lora_on_speech_without_a_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 8, "num_mel_bins": 8}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    base = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **heads, **tokens, max_target_positions=16))
    base = hf.WhisperForConditionalGeneration.from_pretrained(saved_base(tmp_path, base))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none"))
    batch = {"input_features": torch.rand(2, 8, 16), "labels": IDS}
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_lora_for_token_classification(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = hf.RobertaForTokenClassification(
        hf.RobertaConfig(**SMALL, **HEADS, num_labels=3, max_position_embeddings=32)
    )
    name = saved_base(tmp_path, base)
    base = hf.AutoModelForTokenClassification.from_pretrained(name, num_labels=3)
    config = LoraConfig(task_type=TaskType.TOKEN_CLS, inference_mode=False, r=4, lora_alpha=16, bias="all")
    model = get_peft_model(base, config)
    train(model, {**TEXT, "labels": IDS % 3})
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_lora_for_sentence_similarity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = saved_base(tmp_path, hf.BertModel(hf.BertConfig(**SMALL, **HEADS)))
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=4, bias="none", target_modules=["key", "query", "value"]
    )
    model = get_peft_model(hf.AutoModel.from_pretrained(name), config).eval()
    torch.nn.init.normal_(model.base_model.model.encoder.layer[0].attention.self.query.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("reentrant", [None, True])
def test_a_frozen_half_precision_base_is_prepared_and_trained(reentrant: bool | None) -> None:
    """As the quantisation guide prepares a base in few bits; such bases themselves: test_quantized."""
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **HEADS)).to(torch.bfloat16)
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True, **options)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    train(get_peft_model(base, config), TEXT)
