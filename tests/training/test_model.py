"""Base models: what is accepted, what is refused before anything is loaded, and what a base can't decide by itself."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peftcli.errors import InputError, PeftCliError
from peftcli.recipe.schema import ModelSection
from peftcli.training.locate import resolve_base
from peftcli.training.model import load_base, load_tokenizer, meta_base, open_base
from peftcli.training.quiet import quiet_transformers

from .run_folders import save_base
from .tiny import VOCABULARY, tiny_llama, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    """A base to spoil."""
    return shutil.copytree(base, tmp_path / "base")


def section(folder: Path, **settings: Any) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), **settings})


def edit(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ids() -> torch.Tensor:
    return torch.arange(1, 9).view(1, 8)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_it_was_saved(base: Path) -> None:
    model, tokenizer = load_base(section(base), device="cpu"), load_tokenizer(section(base))
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, tiny_llama().eval()(ids()).logits)
    assert not model.training and model.config._attn_implementation == "sdpa"
    assert model.name_or_path == model.config.name_or_path == str(base)
    assert tokenizer("w3").input_ids == [3]


def test_the_meta_model_has_every_shape_and_no_weight(base: Path) -> None:
    empty, loaded = meta_base(section(base)), load_base(section(base), device="cpu")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    shapes = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes


@pytest.mark.parametrize(("asked", "given"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_the_checkpoints_unless_said(tmp_path: Path, asked: str, given: torch.dtype) -> None:
    folder = save_base(tmp_path / "base", dtype=torch.bfloat16)
    edit(folder, dtype="float32")  # what the config says of the weights may be wrong
    assert {p.dtype for p in load_base(section(folder, dtype=asked), device="cpu").parameters()} == {given}
    assert meta_base(section(folder, dtype=asked)).dtype == given


def test_shards_are_read(base: Path, tmp_path: Path) -> None:
    with quiet_transformers():
        tiny_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(load_base(section(tmp_path), device="cpu")(ids()).logits, tiny_llama().eval()(ids()).logits)


def test_a_model_without_sdpa_takes_eager(base: Path, tmp_path: Path) -> None:
    with quiet_transformers():
        tiny_model("mamba", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert load_base(section(tmp_path), device="cpu").config._attn_implementation == "eager"


def test_a_task_the_model_has_no_class_for_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match="AutoModelForSeq2SeqLM"):
        meta_base(section(base, task_type="SEQ_2_SEQ_LM"))


def test_a_classifier_starts_with_a_fresh_head(base: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no place in the model")  # the language model's head
        model = load_base(section(base, task_type="SEQ_CLS"), device="cpu")
    assert model.score.weight.shape == (2, 16)


# -- what is refused --------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rounded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "config cut short": (lambda folder: (folder / "config.json").write_text('{"model_type": "lla'), "config.json"),
    "unknown type": (lambda folder: edit(folder, model_type="lama"), "model_type: unknown .*'lama'\n.*`llama`"),
    "no such type": (lambda folder: edit(folder, model_type=7), "model_type: unknown model type 7"),
    "weights cut short": (cut, "model.safetensors: is cut short"),
    "weights missing": (drop, r"(?s)up_proj.weight: is missing.*norm.weight: is missing|norm.weight.*up_proj.weight"),
    "weights in whole numbers": (rounded, "up_proj.weight: is stored as I32"),
    "only a pickle": (pickled, "only as a pickle"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "endless layers": (lambda folder: edit(folder, num_hidden_layers=10**9), "num_hidden_layers: is 1,000,000,000"),
    "endless vocabulary": (lambda folder: edit(folder, vocab_size=10**12), "vocab_size: is 1,000,000,000,000"),
    "other sizes": (
        lambda folder: edit(folder, intermediate_size=10**12),
        r"(?s)layers.0.mlp.gate_proj.weight: .*\[32, 16\].*\[1000000000000, 16\].*layers.1.mlp.down_proj",
    ),
    "no vocabulary": (lambda folder: edit(folder, vocab_size=0), "vocab|can't be loaded"),
    "no size at all": (lambda folder: edit(folder, hidden_size="wide"), "config.json: is no config of a llama"),
    "heads that don't divide": (lambda folder: edit(folder, num_attention_heads=3), "(?s)config|can't be loaded"),
    "quantised otherwise": (
        lambda folder: edit(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config.quant_method: .*'gptq'",
    ),
    "quantised nonsense": (lambda folder: edit(folder, quantization_config=4), "quantization_config: is no object"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json: .*can't be read",
    ),
    "template out of its box": (template("{{ ''.__class__.__mro__ }}"), "chat template reaches out of its sandbox"),
    "template is a number": (
        lambda folder: edit(folder, "tokenizer_config.json", chat_template=5),
        "chat_template: 5 is no chat template",
    ),
    "template is none": (template("{% for m in messages %}"), "chat template is no Jinja template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(copied: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    spoil(copied)
    with pytest.raises(InputError, match=message):
        load_tokenizer(section(copied))
        load_base(section(copied), device="cpu")


def test_an_index_that_leaves_the_folder(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"weight_map: .* is no plain file name"):
        open_base(section(copied))


@pytest.mark.parametrize(("file", "hint"), [("adapter_config.json", "name the base"), ("model.gguf", "model.gguf")])
def test_what_is_no_base_is_told_apart(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=hint):
        open_base(section(tmp_path))


# -- what a base can't decide -----------------------------------------------------------------------------------------


def evil(folder: Path, file: str) -> Path:
    """A Python file in a base that leaves a trace when it is run."""
    trace = folder.parent / "it ran"
    (folder / file).write_text(f"open({str(trace)!r}, 'w')\nraise SystemExit\n")
    return trace


def test_code_that_comes_with_a_base_is_not_run(copied: Path) -> None:
    trace = evil(copied, "code.py")
    edit(copied, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, trust_remote_code=True)
    with pytest.warns(UserWarning, match="auto_map is ignored; transformers' own llama"):
        load_base(section(copied), device="cpu")
    edit(copied, model_type="evil")
    with pytest.raises(InputError, match=r"(?s)auto_map: .*remote code.*model.trust_remote_code: true"):
        load_base(section(copied), device="cpu")
    assert not trace.exists()


def test_neither_is_a_tokenizers(copied: Path) -> None:
    trace = evil(copied, "code.py")
    edit(copied, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]})
    with pytest.raises(InputError, match=r"tokenizer_config.json: auto_map: .*remote code"):
        load_tokenizer(section(copied))
    assert not trace.exists()


def test_code_is_run_if_the_recipe_says_so(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (copied / "code_of_ours.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'ours'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    classes = {"AutoConfig": "code_of_ours.Config", "AutoModelForCausalLM": "code_of_ours.Model"}
    edit(copied, model_type="ours", auto_map=classes)
    assert type(load_base(section(copied, trust_remote_code=True), device="cpu")).__name__ == "Model"


def test_attention_kernels_are_the_recipes(copied: Path) -> None:
    edit(copied, _attn_implementation="evil/kernel", _attn_implementation_internal="evil/kernel")
    with pytest.warns(UserWarning, match="`_attn_implementation` is ignored"):
        assert load_base(section(copied), device="cpu").config._attn_implementation == "sdpa"
    with pytest.warns(UserWarning):
        model = load_base(section(copied, attn_implementation="eager"), device="cpu")
    assert model.config._attn_implementation == "eager"


def test_an_adapter_inside_is_not_loaded_along(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PEFT is installed, transformers would: it is shown a folder without it."""
    (copied / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nonexistent"}')
    seen = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def watched(cls: type, folder: Path, *args: Any, **kwargs: Any) -> Any:
        seen.append({path.name for path in Path(folder).iterdir()})
        return original(cls, folder, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(watched))
    with pytest.warns(UserWarning, match="an adapter inside the base's folder is ignored"):
        load_base(section(copied), device="cpu")
    assert "adapter_config.json" not in seen[0] and "model.safetensors" in seen[0]


# -- tokenizers -------------------------------------------------------------------------------------------------------


def without_pad(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_pad_token_is_chosen_and_said(copied: Path) -> None:
    without_pad(copied)
    with pytest.warns(UserWarning, match=r"no pad token: w1 fills up"):  # the vocabulary has nothing better than eos
        assert load_tokenizer(section(copied)).pad_token == "w1"
    edit(copied, "tokenizer_config.json", unk_token="w0")
    with pytest.warns(UserWarning, match=r"no pad token: w0 fills up"):
        assert load_tokenizer(section(copied)).pad_token == "w0"


def test_ordinary_tokens_need_an_embedding(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", vocab_size=VOCABULARY - 1)
    with pytest.raises(InputError, match="has 97 tokens, but the model embeds only 96"):
        load_tokenizer(section(folder))


def test_added_tokens_without_one_are_named(copied: Path) -> None:
    tokenizer = load_tokenizer(section(copied))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(copied)
    with pytest.warns(UserWarning, match="no embedding for <extra>"):
        load_tokenizer(section(copied))


def test_a_template_may_refuse_a_conversation(copied: Path) -> None:
    template("{{ raise_exception('only tools, please') }}")(copied)
    assert load_tokenizer(section(copied)).chat_template


# -- where bases are --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository


def test_a_hub_id_is_found_in_the_cache(hub: Path) -> None:
    assert (resolve_base("someone/tiny") / "config.json").is_file()
    model = load_base(ModelSection(name_or_path="someone/tiny"), device="cpu")
    assert model.config.name_or_path == "someone/tiny"  # not the cache's folder: adapters carry it


@pytest.mark.parametrize("name", ["someone/else", "../base", "/no/such/folder", "a b", "model.gguf"])
def test_what_can_not_be_found_is_refused(hub: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    with pytest.raises(InputError, match=r"not in the hub's cache|neither a folder nor a .gguf file"):
        resolve_base(name)


def test_the_corpus_is_judged_right(shared: Path) -> None:
    corpus = shared / "corpus"
    rows = [row for row in json.loads((corpus / "index.json").read_text()) if row["kind"] == "base"]
    wrong = {row["id"]: said for row in rows if (said := misjudged(row, section(corpus / row["path"]))) is not None}
    assert rows and not wrong


def misjudged(row: dict[str, Any], model: ModelSection) -> str | None:
    """What was said where the base was not accepted or refused, and named, as its row asks for; else None."""
    canary = Path(row.get("canary", "/nowhere/at/all"))
    if "canary" in row:
        canary.unlink(missing_ok=True)
    verdict, said = "accept", ""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            load_tokenizer(model), load_base(model, device="cpu")
        except PeftCliError as error:
            verdict, said = "reject", str(error).lower()
    named = all(any(word.lower() in said for word in names.split("|")) for names in row["names"])
    right = row["must"] in (verdict, "either") and (verdict == "accept" or named) and not canary.exists()
    return None if right else f"{verdict}: {said}"
