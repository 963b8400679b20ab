"""Which objective a recipe has."""

from __future__ import annotations

from torch import nn  # noqa: TID253

from peftcli.recipe.schema import Recipe
from peftcli.recipe.task_rules import task_of
from peftcli.training.losses import CausalLMLoss
from peftcli.training.objectives.base import Objective
from peftcli.training.objectives.classes import ClassLoss, TagLoss
from peftcli.training.objectives.pairs import PairLoss
from peftcli.training.objectives.preference import DPOLoss, ORPOLoss
from peftcli.training.objectives.seq2seq import Seq2SeqLoss
from peftcli.training.objectives.spans import SpanLoss


def objective(recipe: Recipe, model: nn.Module, *, bf16: bool, packed: bool = False) -> Objective:
    """The module the loop trains.

    Args:
        recipe: decides the task; with classes, `model.labels` names them.
        model: adapted or not.
        bf16: run under bfloat16 autocast.
        packed: batches are rows of several samples; only language models have such.
    """
    match task_of(recipe):
        case "preference":
            assert recipe.preference is not None
            loss = DPOLoss if recipe.preference.loss == "dpo" else ORPOLoss
            return loss(model, recipe.preference, bf16=bf16)
        case "SEQ_2_SEQ_LM":
            return Seq2SeqLoss(model, bf16=bf16)
        case "SEQ_CLS":
            return ClassLoss(model, bf16=bf16)
        case "TOKEN_CLS":
            return TagLoss(model, recipe.model.labels or [], bf16=bf16)
        case "QUESTION_ANS":
            return SpanLoss(model, bf16=bf16)
        case "FEATURE_EXTRACTION":
            return PairLoss(model, recipe.training.temperature, bf16=bf16)
        case _:
            return CausalLMLoss(model, bf16=bf16, packed=packed)
