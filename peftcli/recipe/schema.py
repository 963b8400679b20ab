"""The recipe: every field, its type, its bounds and what it means. Needs no torch and no hardware.

`load_recipe` (load.py) is how files become recipes; from Python, `Recipe.model_validate({...})` does the same without
places in its messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from peftcli.adapters.registry import needs_rows
from peftcli.recipe.adapter_section import AdapterSection
from peftcli.recipe.section import Positive, Probability, Section, Text
from peftcli.recipe.task_rules import check_task, contradiction
from peftcli.recipe.training_section import TrainingSection

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
DataType = Literal["float32", "bfloat16", "float16"]
Format = Literal[
    "auto",
    "chat",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "preference",
    "seq2seq",
    "classification",
    "tokens",
    "qa",
    "pairs",
]


MAX_SOURCES = 1000


class ModelSection(Section):
    """The base model."""

    name_or_path: Text
    """Hub id, folder, .gguf file, or package:NAME for a base model shipped as a Python package."""
    revision: Text | None = None
    """Branch, tag or commit of the base on the hub."""
    dtype: Literal["auto"] | DataType = "auto"
    """Type of the base's weights; auto: as stored."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; a model without sdpa takes eager. A base can't ask for another one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Only for bases you have read."""
    task_type: TaskType = "CAUSAL_LM"
    """What the model is trained to do; decides head, loss and metrics."""
    labels: Annotated[list[Text], Field(min_length=2, max_length=1 << 16)] | None = None
    """Names of the classes in their order (SEQ_CLS, TOKEN_CLS). null: those of the training data, sorted."""


class QuantizationSection(Section):
    """The base in 4 or 8 bits. Names and meanings are those of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = False
    """Store the base's linear layers in 4 bits."""
    load_in_8bit: bool = False
    """Store the base's linear layers in 8 bits (LLM.int8)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales too: 0.4 bits a weight less."""
    bnb_4bit_compute_dtype: DataType = "bfloat16"
    """Type the 4-bit weights are expanded to for each multiplication."""
    bnb_4bit_quant_storage: Literal["uint8"] | DataType = "uint8"
    """Type the packed 4-bit codes are stored as; FSDP shards only floating ones, of the type it computes in."""
    llm_int8_threshold: Positive = 6.0
    """Inputs above this are multiplied in 16 bits (8 bits only)."""
    llm_int8_skip_modules: list[Text] | None = None
    """Modules left as they are, besides the heads, which always are."""

    @model_validator(mode="after")
    def _one_width(self) -> QuantizationSection:
        if self.load_in_4bit == self.load_in_8bit:
            raise contradiction(
                "asks for both 4 and 8 bits" if self.load_in_4bit else "asks for neither 4 nor 8 bits",
                fix="set load_in_4bit or load_in_8bit, or leave quantization out",
            )
        return self


class DataSource(Section):
    """One file, folder or hub data set."""

    path: Text
    """File or folder, relative to the recipe's folder, or the name of a data set on the hub."""
    name: Text | None = None
    """Configuration of a hub data set."""
    split: Text | None = None
    """Split of a hub data set. null: train for training, validation or test for evaluation."""
    format: Format | None = None
    """Format of this source, where it differs from data.format."""
    columns: dict[Text, Text] | None = None
    """The data set's column for each name its format expects, e.g. {prompt: question, completion: answer}."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each sample is seen in an epoch; a fraction takes that part of them."""
    max_samples: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    """Read at most this many samples."""
    task: Annotated[int, Field(ge=0, lt=1 << 20)] = 0
    """Number of the task these samples are of, for methods that learn several (poly, multitask_prompt_tuning)."""


class EvalSplit(Section):
    """Evaluation samples taken out of the training data."""

    split: Probability
    """The part of the training samples that is held out."""


def _sources(value: Any) -> Any:
    """A path, one source or a list of either as a tuple of sources."""
    if not isinstance(value, (str, dict, list, tuple)):
        return value
    items = value if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(items) <= MAX_SOURCES:
        raise PydanticCustomError(
            "sources", "{problem}", {"problem": f"names {len(items)} sources, not 1 to {MAX_SOURCES}"}
        )
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


SPLIT_TAG, SOURCES_TAG = "(held-out part)", "(sources)"


def _is_split(value: Any) -> str:
    is_split = isinstance(value, EvalSplit) or (isinstance(value, dict) and "path" not in value)
    return SPLIT_TAG if is_split else SOURCES_TAG


Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(_sources, json_schema_input_type=str | DataSource | list[str | DataSource]),
]
EvalData = Annotated[
    Annotated[EvalSplit, Tag(SPLIT_TAG)] | Annotated[Sources, Tag(SOURCES_TAG)], Discriminator(_is_split)
]


class DataSection(Section):
    """What is learnt, and how it becomes tokens."""

    train: Sources
    """Training data: a path, or a list of sources."""
    eval: EvalData | None = None
    """Evaluation data: {split: 0.05} holds out that part of the training data; otherwise as `train`."""
    format: Format = "auto"
    """Format of the samples; auto: detected from their columns."""
    max_length: Annotated[int, Field(ge=1, le=1 << 24)] = 1024
    """Longest sample in tokens."""
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to longer ones: refuse the data set, leave them out, cut them, or cut them into several."""
    packing: Literal["none", "bfd"] = "none"
    """bfd: rows of max_length tokens are filled with several samples (best fit decreasing), which never attend to each
    other; a batch is that many rows. Steps are of equal size whatever the samples' lengths are."""
    loss_on: Literal["all", "completion", "assistant", "last_assistant"] = "assistant"
    """Tokens that are learnt."""
    streaming: bool = False
    """Read the training data while they are trained on, so that they need not fit into memory: `buffer_size` rows at a
    time, those of several sources in turn. Needs training.max_steps; behind their end the data begin again."""
    buffer_size: Annotated[int, Field(ge=1, le=1 << 24)] = 4096
    """Rows of a stream that are read, tokenised and shuffled at a time."""
    cache: bool = True
    """Keep tokenised data for the next run with the same files, tokenizer and settings (in $PEFTCLI_CACHE/data)."""
    apply_chat_template: bool = True
    """Write prompt/completion and alpaca rows as turns of the tokenizer's chat template, if it has one; else as plain
    text. Conversations always go through the template, running text never does."""


class LauncherSection(Section):
    """How processes are started."""

    type: Literal["auto", "none", "accelerate", "deepspeed", "fsdp"] = "auto"
    """auto: in this process when num_processes is 1, under accelerate otherwise."""
    num_processes: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Processes on all machines together; auto: on each machine one for each GPU, or one where there is none."""
    num_machines: Annotated[int, Field(ge=1, le=4096)] = 1
    """Machines. `peft train` is started on each with the same recipe and a machine_rank of its own."""
    machine_rank: Annotated[int, Field(ge=0, lt=4096)] | None = None
    """Which of several machines this is; 0 writes the results."""
    main_process_ip: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,255}$")] | None = None
    """Address or name of machine 0, as the other machines reach it."""
    main_process_port: Annotated[int, Field(ge=1, lt=65536)] | None = None
    """Port on machine 0 at which processes meet. null: 29500 with several machines, else a free one."""
    timeout: Annotated[int, Field(ge=1, le=86_400)] = 120
    """Seconds machines wait for one another at the start."""
    config: Text | None = None
    """Launcher file: the name of one in configs/ or a path. null: the one that fits `type`."""

    @model_validator(mode="after")
    def _machines_add_up(self) -> LauncherSection:
        machines = self.num_machines
        if machines == 1 and self.main_process_ip is not None:
            raise contradiction(
                "launcher.main_process_ip says where machine 0 is, but there is only one",
                fix="set launcher.num_machines, or leave main_process_ip out",
            )
        if (self.machine_rank or 0) >= machines:
            raise contradiction(
                f"launcher.machine_rank is {self.machine_rank}, but launcher.num_machines is {machines}",
                fix=f"machines are counted from 0 to {machines - 1}",
            )
        for name, number in (("num_machines", machines), ("num_processes", self.num_processes)):
            if self.type == "none" and number not in (1, "auto"):
                raise contradiction(
                    f"launcher.type none starts one process, but launcher.{name} is {number}",
                    fix="set launcher.type to auto, accelerate, deepspeed or fsdp",
                )
        if self.num_processes != "auto" and self.num_processes % machines:
            raise contradiction(
                f"launcher.num_processes is {self.num_processes}: as many on each of {machines} machines can't be had",
                fix="num_processes counts those of all machines: set it to a multiple of launcher.num_machines",
            )
        return self


class PreferenceSection(Section):
    """Learning from pairs of answers of which one is preferred. Names are those of TRL's DPOConfig and ORPOConfig."""

    loss: Literal["dpo", "orpo"] = "dpo"
    """dpo: against the base, which is the model with its adapter switched off (arXiv:2305.18290); orpo: without a
    reference, beside the loss on the preferred answer (arXiv:2403.07691)."""
    beta: Positive = 0.1
    """dpo: how closely the model is held to the base; orpo: weight of the preference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: part of the pairs that are taken to be the wrong way round."""


class Recipe(Section):
    """A training run, from the base model to the launcher."""

    model: ModelSection
    adapter: AdapterSection
    quantization: QuantizationSection | None = None
    data: DataSection
    training: TrainingSection
    preference: PreferenceSection | None = None
    launcher: LauncherSection = LauncherSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.data.eval is None and self.training.early_stopping_patience is not None:
            raise contradiction(
                "training.early_stopping_patience needs evaluations", fix="set data.eval, e.g. {split: 0.05}"
            )
        check_task(self)
        config = self.adapter.config
        if self.quantization is not None and config is None:
            raise contradiction(
                "A quantised base can't be trained in full.",
                fix="choose an adapter.method, or leave quantization out",
            )
        start = getattr(config, "init_lora_weights", None)
        if self.quantization is not None and start in ("loftq", "lora_ga"):
            raise contradiction(
                f"A start by {start} needs the base's weights as they were before they were quantised.",
                fix="leave quantization out, or choose another adapter.init_lora_weights",
            )
        if self.data.packing != "none" and config is not None and needs_rows(config):
            raise contradiction(
                f"{config.peft_type} must know which row of a batch a token is in: rows can't hold several samples.",
                fix="set data.packing to none",
            )
        if self.training.gradient_checkpointing and config is not None and not config.allows_checkpointing:
            raise contradiction(
                f"{config.peft_type} does not work with gradient checkpointing.",
                fix="set training.gradient_checkpointing to false",
            )
        return self
