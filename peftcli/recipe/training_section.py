"""The `training:` section. Names and meanings are those of transformers' TrainingArguments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from peftcli.recipe.section import Count, Fraction, NotNegative, Positive, Section, Text

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"
]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "trackio"]
_TrackerInput = Tracker | Literal["none"] | list[Tracker] | None
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


def _trackers(value: Any) -> Any:
    """`none`, one name or a list of names, as in TrainingArguments."""
    if value is None or value == "none":
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class TrainingSection(Section):
    """How the adapter is trained."""

    output_dir: Text
    """Run folder: checkpoints, the finished adapter, log and plots. Relative to the current folder."""

    num_train_epochs: Positive = 3.0
    """Passes over the training data; a fraction is allowed."""
    max_steps: Count | Literal[-1] = -1
    """Optimizer steps; overrides num_train_epochs. -1: as many as the epochs need."""
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 8
    """Samples per process in one forward pass."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 8
    """Samples per process in one forward pass of the evaluation."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    """Forward passes per optimizer step."""
    group_by_length: bool = True
    """Put samples of similar length into one batch: less padding. False takes less memory on bases that run without it."""

    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Scheduler = "cosine"
    """Course of the learning rate."""
    lr_scheduler_kwargs: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Further arguments of that scheduler, e.g. {min_lr: 1e-5} for cosine_with_min_lr."""
    warmup_ratio: Fraction = 0.03
    """Part of the steps in which the learning rate rises from 0; ignored when warmup_steps is set."""
    warmup_steps: Annotated[int, Field(ge=0, le=1 << 40)] = 0
    """Steps in which the learning rate rises from 0."""
    optim: Optimizer = "adamw_torch"
    """Optimizer."""
    weight_decay: NotNegative = 0.0
    """Weight decay, decoupled; not applied to biases and norms."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Positive = 1e-8
    """Adam's epsilon."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0: not at all."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+: learning rate of the B matrices over that of the A matrices (the paper uses 16). null: one rate for all."""

    temperature: Positive = 0.05
    """FEATURE_EXTRACTION: similarities are divided by it; lower tells near misses apart more sharply."""
    bf16: bool = False
    """Compute in bfloat16 (autocast) whatever the base's dtype is."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    logging_steps: Count = 10
    """Steps between two entries of log.jsonl."""
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers, json_schema_input_type=_TrackerInput)] = ()
    """Trackers besides log.jsonl and loss.png: a name, a list of names, or none."""
    run_name: Text | None = None
    """Name of the run in trackers. null: the name of the run folder."""

    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When data.eval is evaluated; the end of training always is."""
    eval_steps: Count = 50
    """Steps between two evaluations (eval_strategy: steps)."""
    metric_for_best_model: Literal[
        "eval_loss",
        "eval_token_accuracy",
        "eval_accuracy",
        "eval_macro_f1",
        "eval_span_f1",
        "eval_window_exact_match",
        "eval_window_f1",
        "eval_margin",
    ] = "eval_loss"
    """What decides which checkpoint is the best; each task gives some of these."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row without a better metric. null: never."""
    early_stopping_threshold: NotNegative = 0.0
    """By how much the metric must improve to count as better."""

    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When checkpoints are written; the finished adapter always is."""
    save_steps: Count = 50
    """Steps between two checkpoints (save_strategy: steps)."""
    save_total_limit: Annotated[int, Field(ge=1, le=1 << 20)] | None = 3
    """Checkpoints kept besides the best one. null: all."""
    load_best_model_at_end: bool = True
    """The finished adapter is the best one seen by data.eval; without data.eval it is the last."""
    resume_from_checkpoint: Text | None = None
    """Checkpoint to continue from: `auto` for the newest valid one in output_dir, or its folder."""

    seed: Seed = 42
    """Seed of initialisation, dropout and, unless data_seed is set, the order of the data."""
    data_seed: Seed | None = None
    """Seed of the order of the data."""
