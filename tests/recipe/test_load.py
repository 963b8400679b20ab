"""Recipes from files: what is refused, where it says so, `extends`, overrides, paths, and writing them back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from peftcli.errors import InputError
from peftcli.recipe.load import dump_recipe, load_recipe
from peftcli.recipe.schema import EvalSplit

from .conftest import MINIMAL

Write = Callable[..., Path]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    return str(error.value).replace(f"{path.parent}/", "")


def test_the_smallest_recipe(write: Write, folder: Path) -> None:
    recipe = load_recipe(write())
    assert recipe.model.name_or_path == str(folder / "base")
    assert [source.path for source in recipe.data.train] == [str(folder / "train.jsonl")]
    assert recipe.training.output_dir == str(folder / "here/out/run")
    assert recipe.adapter.config.r == 4 and recipe.adapter.config.target_modules == {"q_proj"}
    assert recipe.training.learning_rate == 2e-4 and recipe.launcher.type == "auto" and recipe.quantization is None


def test_full_has_no_config(write: Write) -> None:
    assert load_recipe(write(("lora\n  r: 4\n  target_modules: [q_proj]", "full"))).adapter.config is None


# change of the minimal recipe -> what the message must hold, the first at its start
BAD = {
    "typo": (("target_modules", "target_module"), "recipe.yaml:6:3: adapter.target_module: ", "`target_modules`"),
    "unknown section": (("training:", "trainer:"), "recipe.yaml:9:1: trainer: ", "other tools", "training: is missing"),
    "foreign name": (
        ("train.jsonl", "train.jsonl\n  sequence_len: 5"),
        "recipe.yaml:9:3: data.sequence_len: ",
        "axolotl's; here `data.max_length`",
    ),
    "wrong section": (
        ("train.jsonl", "train.jsonl\n  learning_rate: 1"),
        "recipe.yaml:9:3: data.learning_rate: ",
        "`training.learning_rate`",
    ),
    "a source's field": (
        ("train.jsonl", "train.jsonl\n  columns: {prompt: q}"),
        "recipe.yaml:9:3: data.columns: unknown field",
        "belongs to a source: `train: {path: FILE, columns: ...}`",
    ),
    "near name": (("out/run", "out/run\n  warmup_ration: 0.1"), "recipe.yaml:11:3: ", "`warmup_ratio`"),
    "token": (
        ("name_or_path: base", "name_or_path: base\n  token: hf_abcdefghijklmnopq"),
        "recipe.yaml:3:3: model.token: ",
        "never in a recipe",
    ),
    "rank as text": (("r: 4", "r: four"), "recipe.yaml:5:6: adapter.r: 'four'", "a whole number"),
    "rank left empty": (("r: 4", "r:"), "recipe.yaml:5:5: adapter.r: is empty", "a whole number"),
    "switch as a word": (("r: 4", "use_dora: 'yes'"), "recipe.yaml:5:13: adapter.use_dora: 'yes'", "true or false"),
    "list as text": (
        ("r: 4", "modules_to_save: lm_head"),
        "recipe.yaml:5:20: adapter.modules_to_save: 'lm_head'",
        "allowed: a list",
    ),
    "misspelt start": (
        ("r: 4", "init_lora_weights: pisa"),
        "recipe.yaml:5:22: adapter.init_lora_weights: 'pisa'",
        "did you mean `pissa`",
    ),
    "axolotl's rank": (("r: 4", "lora_r: 4"), "recipe.yaml:5:3: adapter.lora_r: ", "here `adapter.r`"),
    "another method's field": (
        ("r: 4", "num_virtual_tokens: 4"),
        "recipe.yaml:5:3: adapter.num_virtual_tokens: ",
        "fields of lora: target_modules, ",
    ),
    "misspelt method field": (
        ("method: lora", "methd: lora"),
        "recipe.yaml:4:3: adapter.method: is missing",
        "`methd` is no field",
    ),
    "eval as a number": (
        ("train.jsonl", "train.jsonl\n  eval: 0.1"),
        "recipe.yaml:9:9: data.eval: 0.1",
        "{split: 0.05}",
    ),
    "masked prompts": (
        ("train.jsonl", "train.jsonl\n  train_on_inputs: false"),
        "recipe.yaml:9:3: data.train_on_inputs",
        "leave it out",
    ),
    "home folder": (("train.jsonl", "~/train.jsonl"), "recipe.yaml:8:10: data.train: ~/train.jsonl", "not expanded"),
    "address": (("train.jsonl", "https://a.org/t.jsonl"), "recipe.yaml:8:10: data.train: https://a.org", "download it"),
    "no launcher file": (
        ("out/run", "out/run\nlauncher: {config: zero9}"),
        "recipe.yaml:11:20: launcher.config: there is no launcher file 'zero9' for accelerate",
        "ddp, single",
    ),
    "launcher file of another type": (
        ("out/run", "out/run\nlauncher: {type: deepspeed, config: fsdp-qlora}"),
        "recipe.yaml:11:37: launcher.config: ",
        "set launcher.type: fsdp",
    ),
    "a secret in the adapter": (
        ("r: 4", "r: hf_abcdefghijklmnopqrst"),
        "recipe.yaml:5:6: adapter.r: '***' is not accepted",
    ),
    "weight without end": (
        ("train: train.jsonl", "train: {path: train.jsonl, weight: 1.0e+9}"),
        "recipe.yaml:8:38: data.train.weight: ",
        "1000 or less",
    ),
    "rank as truth": (("r: 4", "r: true"), "recipe.yaml:5:6: adapter.r: True"),
    "negative rank": (("r: 4", "r: -4"), "recipe.yaml:5:6: adapter.r: -4", "1"),
    "nan": (("r: 4", "lora_alpha: .nan"), "recipe.yaml:5:15: adapter.lora_alpha: nan"),
    "method": (("method: lora", "method: lara"), "recipe.yaml:4:11: adapter.method: 'lara'", "lora", "did you mean"),
    "variant": (("method: lora", "method: dora"), "recipe.yaml:4:11: adapter.method: 'dora'", "use_dora: true"),
    "field inside a field": (
        ("r: 4", "loftq_config: {loftq_bits: 9}"),
        "recipe.yaml:5:30: adapter.loftq_config.loftq_bits: 9 is not accepted",
        "2, 4 or 8",
    ),
    "method as number": (("method: lora", "method: 7"), "recipe.yaml:4:11: adapter.method: 7"),
    "no method": (("method: lora\n  r: 4", "r: 4"), "recipe.yaml:4:3: adapter.method: is missing"),
    "field of full": (("method: lora", "method: full"), "recipe.yaml:5:3: adapter.r: ", "`full` trains every weight"),
    "PEFT's task_type": (("r: 4", "task_type: CAUSAL_LM"), "recipe.yaml:5:3: adapter.task_type: ", "model.task_type"),
    "section as text": (
        ("adapter:\n  method: lora\n  r: 4\n  target_modules: [q_proj]", "adapter: lora"),
        "recipe.yaml:3:10: adapter: 'lora' is not accepted",
        "a map of fields",
    ),
    "no targets": (("[q_proj]", "[]"), "recipe.yaml:6:19: adapter.target_modules: is empty"),
    "bad expression": (("[q_proj]", "(q"), "recipe.yaml:6:19: adapter.target_modules: '(q'"),
    "missing data": (("train.jsonl", "none.jsonl"), "recipe.yaml:8:10: data.train: ", "none.jsonl", "No such file"),
    "device as data": (("train.jsonl", "/dev/zero"), "recipe.yaml:8:10: data.train: /dev/zero is neither"),
    "script as data": (("train.jsonl", "./recipe.yaml"), "recipe.yaml:8:10: data.train: ", "no data set"),
    "data source": (
        ("train: train.jsonl", "train:\n    - {path: train.jsonl, wieght: 2}"),
        "recipe.yaml:9:27: data.train.0.wieght: ",
        "`weight`",
    ),
    "eval split": (("train.jsonl", "train.jsonl\n  eval: {split: 2}"), "recipe.yaml:9:17: data.eval.split: 2", "1"),
    "missing base": (("path: base", "path: ./bass"), "recipe.yaml:2:17: model.name_or_path: ", "does not exist"),
    "file as base": (("path: base", "path: train.jsonl"), "recipe.yaml:2:17: model.name_or_path: ", ".gguf"),
    "root": (("out/run", "/"), "recipe.yaml:10:15: training.output_dir: ", "folder of its own"),
    "current folder": (("out/run", "."), "recipe.yaml:10:15: training.output_dir: "),
    "file in the way": (("out/run", "../train.jsonl/run"), "recipe.yaml:10:15: training.output_dir: ", "not a folder"),
    "input as output": (("out/run", "train.jsonl"), "recipe.yaml:10:15: training.output_dir: ", "is a file"),
    "empty output": (("out/run", "''"), "recipe.yaml:10:15: training.output_dir: ''"),
    "null output": (("out/run", ""), "recipe.yaml:10:14: training.output_dir: is empty", "a string"),
    "no checkpoint": (
        ("out/run", "out/run\n  resume_from_checkpoint: gone"),
        "recipe.yaml:11:27: training.resume_from_checkpoint: ",
    ),
    "yes": (
        ("path: base", "path: base\n  trust_remote_code: yes"),
        "recipe.yaml:3:22: model.trust_remote_code: 'yes'",
        "true or false",
        "YAML 1.2",
    ),
    "too long": (("train.jsonl", "train.jsonl\n  max_length: 10000000000"), "recipe.yaml:9:15: data.max_length: "),
    "fraction of a sample": (
        ("out/run", "out/run\n  per_device_train_batch_size: 1.5"),
        "recipe.yaml:11:32: training.per_device_train_batch_size: 1.5",
        "a whole number",
    ),
    "scheduler": (
        ("out/run", "out/run\n  lr_scheduler_type: cosinus"),
        "recipe.yaml:11:22: training.lr_scheduler_type: 'cosinus'",
        "linear, cosine, ",
        "did you mean `cosine`?",
    ),
    "early stopping without evaluations": (
        ("out/run", "out/run\n  early_stopping_patience: 2"),
        "recipe.yaml:11:28: training.early_stopping_patience",
        "data.eval",
    ),
    "blank folder": (("out/run", "'  '"), "recipe.yaml:10:15: training.output_dir: ", "no name for a folder"),
    "folder of two lines": (
        ("out/run", '"out\\nrun"'),
        "recipe.yaml:10:15: training.output_dir: ",
        "no name for a folder",
    ),
    "folder with too long a name": (("out/run", "o" * 256), "recipe.yaml:10:15: training.output_dir: "),
    "folder above the current one": (("out/run", ".."), "recipe.yaml:10:15: training.output_dir: ", "of its own"),
    "folder of the base": (("out/run", "../base"), "recipe.yaml:10:15: training.output_dir: ", "of its own"),
    "nothing but dropout": (
        ("r: 4", "r: 4\n  lora_dropout: 1.0"),
        "recipe.yaml:6:17: adapter.lora_dropout: 1.0 drops everything",
        "less than 1",
    ),
    "processes without a launcher": (
        ("out/run", "out/run\nlauncher: {type: none, num_processes: 2}"),
        "recipe.yaml:11:11: launcher: launcher.type none starts one process",
    ),
    "list as recipe": ((MINIMAL, "- a"), "recipe.yaml:1:1: holds a list", "model, adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, write: Write) -> None:
    change, start, *parts = BAD[case]
    message = refusal(write(change))
    assert any(line.startswith(start) for line in message.splitlines()), message
    for part in parts:
        assert part in message
    assert "pydantic" not in message and "hf_abc" not in message


@pytest.mark.parametrize(
    ("changes", "add", "message"),
    [
        (
            [("path: base", "path: base\n  task_type: SEQ_CLS")],
            "",
            "data.format is `chat`, which is no data for SEQ_CLS",
        ),
        (
            [("out/run", "out/run\n  metric_for_best_model: eval_window_f1")],
            "",
            "eval_window_f1`, which the evaluation of CAUSAL_LM does",
        ),
        ([("path: base", "path: base\n  labels: [a, b]")], "", "model.labels names classes, and CAUSAL_LM has none"),
        ([], "preference: {loss: dpo}\n", "data.format is `chat`, which is no data for preference"),
        (
            [("format: chat", "format: auto\n  overflow: split")],
            "preference: {loss: dpo}\n",
            "a part of a preference sample",
        ),
        (
            [("format: chat", "format: auto\n  packing: bfd")],
            "preference: {loss: dpo}\n",
            "data.packing is for CAUSAL_LM",
        ),
        (
            [("format: chat", "format: auto")],
            "preference: {loss: orpo, label_smoothing: 0.1}\n",
            "label_smoothing is DPO's",
        ),
    ],
)
def test_what_does_not_go_with_the_task_is_refused(
    write: Write, changes: list[tuple[str, str]], add: str, message: str
) -> None:
    assert message in refusal(write(("data:", "data:\n  format: chat"), *changes, add=add))


def test_all_problems_at_once_and_a_bound_on_their_number(write: Write) -> None:
    message = refusal(write(("r: 4", "r: -1"), ("out/run", "''")))
    assert "adapter.r" in message and "training.output_dir" in message
    many = refusal(write(add="".join(f"k{number}: 1\n" for number in range(5000))))
    assert "k0: unknown field" in many and "4981 more" in many and len(many) < 8000


class TestExtends:
    def test_maps_merge_lists_replace(self, write: Write, folder: Path) -> None:
        (folder / "sub").mkdir()
        write(("out/run", "out/run\n  seed: 7"), name="base.yaml")
        (folder / "sub/recipe.yaml").write_text(
            "extends: ../base.yaml\nadapter: {target_modules: [k_proj, v_proj]}\ntraining: {seed: 8}\n"
        )
        recipe = load_recipe(folder / "sub/recipe.yaml")
        assert recipe.adapter.config.r == 4 and recipe.adapter.config.target_modules == {"k_proj", "v_proj"}
        assert recipe.training.seed == 8
        assert recipe.data.train[0].path == str(folder / "train.jsonl")  # starts where base.yaml is

    def test_a_problem_is_placed_in_the_file_that_has_it(self, write: Write, folder: Path) -> None:
        write(("r: 4", "r: -4"), name="base.yaml")
        (folder / "recipe.yaml").write_text("extends: base.yaml\ndata: {max_length: 0}\n")
        message = refusal(folder / "recipe.yaml")
        assert "base.yaml:5:6: adapter.r" in message and "recipe.yaml:2:20: data.max_length" in message

    def test_a_cycle(self, write: Write, folder: Path) -> None:
        write(add="extends: other.yaml\n")
        (folder / "other.yaml").write_text("extends: ./recipe.yaml\n")
        assert "other.yaml:1:10: extends: comes back to itself: recipe.yaml -> other.yaml -> recipe.yaml" in refusal(
            folder / "recipe.yaml"
        )

    def test_a_long_chain(self, folder: Path) -> None:
        for number in range(20):
            (folder / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
        assert "more than 10 files" in refusal(folder / "r0.yaml")

    @pytest.mark.parametrize("value", ["gone.yaml", "5", "[a, b]", "''", "."])
    def test_no_recipe(self, write: Write, value: str) -> None:
        assert re.search(r"recipe.yaml:11:10: extends: |is a folder", refusal(write(add=f"extends: {value}\n")))


class TestOverrides:
    def test_values(self, write: Write, folder: Path) -> None:
        recipe = load_recipe(
            write(),
            [
                "training.learning_rate=1e-4",
                "training.run_name=a=b # no comment: c",
                "adapter.target_modules=[k_proj, 'v_proj']",
                'training.optim="sgd"',
                "data.eval={split: 0.1}",
                "launcher.num_processes=2",
                "training.data_seed=",
                "adapter.r=8",
                "adapter.r=16",
            ],
        )
        assert recipe.training.learning_rate == 1e-4 and recipe.training.run_name == "a=b # no comment: c"
        assert recipe.adapter.config.target_modules == {"k_proj", "v_proj"} and recipe.adapter.config.r == 16
        assert recipe.training.optim == "sgd" and recipe.data.eval == EvalSplit(split=0.1)
        assert recipe.launcher.num_processes == 2 and recipe.training.data_seed is None

    def test_delete(self, write: Write) -> None:
        path = write(add="quantization: {load_in_4bit: true}\n")
        assert load_recipe(path, ["~quantization"]).quantization is None
        assert load_recipe(path, ["~quantization", "~adapter.r"]).adapter.config.r == 8

    def test_items_of_lists(self, write: Write) -> None:
        path = write(("train: train.jsonl", "train: [{path: train.jsonl}]"))
        assert load_recipe(path, ["data.train.0.max_samples=3"]).data.train[0].max_samples == 3

    def test_paths_start_in_the_current_folder(self, write: Write, folder: Path) -> None:
        (folder / "here/mine.jsonl").write_text("{}\n")
        assert load_recipe(write(), ["data.train=mine.jsonl"]).data.train[0].path == str(folder / "here/mine.jsonl")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("adapter.r=x", "override `adapter.r=x`: adapter.r: 'x' is not accepted"),
            ("adapter.rank=4", "override `adapter.rank=4`: adapter.rank: "),
            ("adapter.r=010", "override `adapter.r=010`: .*octal"),
            ("nonsense", "override `nonsense`: is not `field=value`"),
            ("--lr=5", "override `--lr=5`: `--lr` is not a field's name"),
            ("=5", "is not a field's name"),
            ("~training.seed", "override `~training.seed`: the recipe does not set `training.seed`"),
            ("~nothing.at.all", "does not set"),
            ("adapter.r.x=1", "there is nothing to hold `x`"),
            ("data.train=[*a]", r"override `data.train=\[\*a\]`: .*alias"),
            ("data.train=[", "is not YAML"),
            ("training.run_name=hf_abcdefghijklmnopqrstu x", ""),
        ],
    )
    def test_refused(self, write: Write, override: str, message: str) -> None:
        if message:
            assert re.search(message, refusal(write(), override))
        else:
            assert "hf_" not in refusal(write(), override, "adapter.r=x")


class TestDump:
    def test_round_trip(self, write: Write, folder: Path) -> None:
        odd = [
            "1e-4",
            "010",
            "no",
            "~",
            "null",
            "0o7",
            "a: b",
            "x #y",
            "é☃",
            "'",
            '"',
            " x",
            "-",
            "{a",
            "1:30",
            "=",
            "<<",
        ]
        for text in odd:
            quoted = '"' + text.replace('"', '\\"') + '"'
            recipe = load_recipe(
                write(), [f"training.run_name={quoted}", "data.eval={split: 0.1}", "adapter.rank_pattern={q_proj: 2}"]
            )
            assert recipe.training.run_name == text
            (folder / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            again = load_recipe(folder / "again.yaml")
            assert again == recipe and dump_recipe(again) == dump_recipe(recipe)

    def test_everything_is_written_out(self, write: Write, folder: Path) -> None:
        text = dump_recipe(load_recipe(write()))
        for line in (
            "learning_rate: 0.0002",
            "lora_dropout: 0.0",
            f"path: {folder}/train.jsonl",
            "attn_implementation: sdpa",
        ):
            assert line in text
        for line in ("inference_mode", "peft_type", "task_type: null"):
            assert line not in text

    def test_without_its_inputs(self, write: Write, folder: Path) -> None:
        """The worker reads the recipe of the run folder when the data may be gone."""
        text = dump_recipe(load_recipe(write()))
        (folder / "train.jsonl").unlink()
        (folder / "again.yaml").write_text(text)
        assert load_recipe(folder / "again.yaml", check_paths=False).data.train[0].path.endswith("train.jsonl")

    def test_secrets_stay_out(self, write: Write) -> None:
        names = ["hf_abcdefghijklmnopqrst", "https://me:pass@host/x", "run api_key=0123456789"]
        for name in names:
            text = dump_recipe(load_recipe(write(), [f"training.run_name={name}"]))
            assert "***" in text
            assert not re.search("hf_abc|pass@|01234", text)

    @pytest.mark.parametrize("path", ["out/${HF_TOKEN}", "$HF_TOKEN/run", "~/run"])
    def test_environment_is_not_expanded(self, path: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "secret-value")
        with pytest.raises(InputError, match="are not expanded") as refused:
            load_recipe(write(("out/run", path)))
        assert "training.output_dir" in str(refused.value) and "secret-value" not in str(refused.value)
