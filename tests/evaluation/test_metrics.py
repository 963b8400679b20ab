"""Estimates and their errors, against the textbook and against resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftcli.errors import InputError
from peftcli.evaluation.metrics import METRICS, TokenScores, contains, exact_match, find, loss, mean, perplexity, ratio


def scores(seed: int = 0, samples: int = 200) -> TokenScores:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 30, samples)
    return TokenScores(counts * generator.gamma(2.0, 0.4, samples), counts)


def test_error_of_a_mean_is_the_textbooks() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    estimate = mean(values)
    assert estimate.value == pytest.approx(0.6)
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_difference_is_paired() -> None:
    base, tuned = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    delta = mean(tuned) - mean(base)
    assert delta.value == pytest.approx(0.25)
    assert delta.standard_error == pytest.approx(np.std(np.subtract(tuned, base), ddof=1) / 2)
    assert (mean(tuned) - mean(tuned)).standard_error == 0


def test_loss_is_the_mean_over_tokens() -> None:
    estimate = loss(TokenScores(np.array([3.0, 1.0]), np.array([1, 3])))
    assert estimate.value == 1.0  # not the mean of 3 and 1/3
    assert perplexity(TokenScores(np.array([3.0, 1.0]), np.array([1, 3]))).value == pytest.approx(math.e)


@pytest.mark.parametrize("metric", [loss, perplexity])
def test_standard_error_agrees_with_the_bootstrap(metric) -> None:
    data, generator = scores(), np.random.default_rng(1)
    draws = [generator.integers(0, len(data.counts), len(data.counts)) for _ in range(2000)]
    resampled = [metric(TokenScores(data.losses[draw], data.counts[draw])).value for draw in draws]
    assert metric(data).standard_error == pytest.approx(np.std(resampled), rel=0.1)


def test_influences_add_up_to_nothing() -> None:
    assert perplexity(scores()).influence.sum() == pytest.approx(0, abs=1e-12)


def test_one_sample_has_no_error() -> None:
    assert math.isnan(ratio([2.0], [4.0]).standard_error)


def test_overflow_is_capped() -> None:
    assert math.isfinite(perplexity(TokenScores(np.array([9000.0, 8000.0]), np.array([1, 1]))).value)


@pytest.mark.parametrize(
    ("generated", "expected", "same", "inside"),
    [
        ("scale a@prod 3", "scale a@prod 3", 1, 1),
        (" scale a@prod 3\n", "scale a@prod 3", 1, 1),
        ("Sure: scale a@prod 3.", "scale a@prod 3", 0, 1),
        ("scale a@prod 30", "scale a@prod 3", 0, 1),
        ("Scale a@prod 3", "scale a@prod 3", 0, 0),
        ("", "scale a@prod 3", 0, 0),
    ],
)
def test_answers(generated: str, expected: str, same: float, inside: float) -> None:
    assert (exact_match(generated, expected), contains(generated, expected)) == (same, inside)


def test_thresholds_know_the_good_direction() -> None:
    assert METRICS["exact_match"].reaches(0.6, 0.6) and not METRICS["exact_match"].reaches(0.59, 0.6)
    assert METRICS["loss"].reaches(0.5, 0.6) and not METRICS["loss"].reaches(0.61, 0.6)
    assert not any(metric.reaches(math.nan, 0.5) for metric in METRICS.values())


def test_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="did you mean `exact_match`"):
        find("exactmatch", "--metrics")
