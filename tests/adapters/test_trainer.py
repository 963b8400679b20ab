"""The quick tour of PEFT's documentation with only the import changed: `transformers.Trainer` trains a PeftModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peftcli import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its future

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5_TINY = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY, num_labels=2))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5_TINY))


def rows(label: Any) -> list[dict[str, Any]]:
    ids = torch.arange(2, 10)
    one = {
        "input_ids": ids,
        "attention_mask": torch.ones(8, dtype=torch.long),
        "labels": label(ids),
        "comment": "unused",
    }
    return [one] * 8


CASES = {
    "causal": (llama, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_dropout=0.1), rows(lambda ids: ids)),
    "classes": (bert, LoraConfig(task_type=TaskType.SEQ_CLS, r=4), rows(lambda ids: 1)),
    "seq2seq": (t5, IA3Config(task_type=TaskType.SEQ_2_SEQ_LM), rows(lambda ids: ids)),
    "prompt": (llama, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4), rows(lambda ids: ids)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trained_saved_and_loaded(name: str, checkpointing: bool, tmp_path: Path) -> None:
    build, config, data = CASES[name]
    model = get_peft_model(build(), config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        max_steps=12,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0] if key != "comment"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model.eval()(**batch).loss)


def test_a_run_resumes_from_the_trainer_s_own_checkpoint(tmp_path: Path) -> None:
    build, config, data = CASES["causal"]
    arguments = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "save_steps": 2}

    def trainer(steps: int) -> Trainer:
        model = get_peft_model(build(), config)
        settings = TrainingArguments(output_dir=str(tmp_path), max_steps=steps, **arguments)
        return Trainer(model=model, args=settings, train_dataset=data)

    first = trainer(2)
    first.train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name])
