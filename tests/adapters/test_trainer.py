"""The quick tour of PEFT's documentation with only the import changed: `transformers.Trainer` trains a PeftModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
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


def test_trainer_compiles_the_model(tmp_path: Path) -> None:
    build, config, data = CASES["causal"]
    model = get_peft_model(build(), config)
    settings = {"max_steps": 3, "torch_compile_backend": "aot_eager", "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=5e-2, save_strategy="no", **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    trainer.train()
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    model.save_pretrained(tmp_path / "adapter")
    ids = data[0]["input_ids"][None]
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, build().eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_the_best_checkpoint_is_loaded_at_the_end(tied: bool, tmp_path: Path) -> None:
    """The quick tour's arguments. Tied embeddings are one tensor of two names, which safetensors refuses."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4))
    data = rows(lambda ids: ids)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=3,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is the first: training ends elsewhere
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[-1] + 1e-4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0])


def test_a_state_dict_with_tied_tensors_loads_strictly() -> None:
    def tied() -> PeftModel:
        base = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))
        return get_peft_model(base, LoraConfig(init_lora_weights=False))

    one, other = tied(), tied()
    state = one.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert other.load_state_dict(state).missing_keys == []
    ids = torch.arange(6)[None]
    assert torch.equal(other.eval()(ids).logits, one.eval()(ids).logits)
    assert other.base_model.model.lm_head.weight is other.base_model.model.model.embed_tokens.weight


def test_accelerate_prepares_unwraps_and_saves(tmp_path: Path) -> None:
    build, config, data = CASES["causal"]
    model = get_peft_model(build(), config)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    loader = torch.utils.data.DataLoader(
        [{k: v for k, v in row.items() if k != "comment"} for row in data], batch_size=4
    )
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    unwrapped = accelerator.unwrap_model(prepared)
    assert unwrapped is model
    unwrapped.save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    ids = data[0]["input_ids"][None]
    assert torch.equal(PeftModel.from_pretrained(build(), tmp_path)(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_pipelines_run_an_adapted_model(task: str) -> None:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(30)} | {"[PAD]": 30, "[UNK]": 31}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    build, config, _ = CASES["causal" if task == "text-generation" else "classes"]
    model = get_peft_model(build(), config).eval()
    options = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
    answer = pipeline(task, model=model, tokenizer=tokenizer)("w3 w4 w5", **options)
    inputs = tokenizer("w3 w4 w5", return_tensors="pt", return_token_type_ids=False)
    if task == "text-generation":
        expected = tokenizer.decode(model.generate(**inputs, **options)[0])
        assert answer[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")
    else:
        assert answer[0]["score"] == pytest.approx(float(model(**inputs).logits.softmax(-1).max()), abs=1e-5)


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
