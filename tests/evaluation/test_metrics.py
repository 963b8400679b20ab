"""Estimates, scores and tests, against hand computation, the textbook and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftcli.errors import InputError
from peftcli.evaluation import texts
from peftcli.evaluation.estimates import Estimate, accuracy, macro_f1, mean, ratio, span_f1, spans
from peftcli.evaluation.metrics import METRICS, TokenScores, Written, find, known_metrics, loss, perplexity, reaches
from peftcli.evaluation.significance import SIGN, T, incomplete_beta, paired_test, sign_test, t_test


def scores(seed: int = 0, samples: int = 200) -> TokenScores:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 30, samples)
    return TokenScores(counts * generator.gamma(2.0, 0.4, samples), counts, generator.integers(0, counts + 1))


def few(losses: list[float], counts: list[int]) -> TokenScores:
    return TokenScores(np.array(losses), np.array(counts), np.zeros(len(counts), np.int64))


# -- estimates ------------------------------------------------------------------------------------------------------


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
    estimate = loss(few([3.0, 1.0], [1, 3]))
    assert estimate.value == 1.0  # not the mean of 3 and 1/3
    assert perplexity(few([3.0, 1.0], [1, 3])).value == pytest.approx(math.e)


def test_token_accuracy_is_a_share_of_tokens() -> None:
    found = METRICS["token_accuracy"].of_tokens(TokenScores(np.zeros(2), np.array([1, 3]), np.array([1, 1])))
    assert found.value == 0.5


def resampled_error(metric, count: int, draws: int = 1500) -> float:
    generator = np.random.default_rng(1)
    return float(np.std([metric(generator.integers(0, count, count)).value for _ in range(draws)]))


@pytest.mark.parametrize("metric", [loss, perplexity, METRICS["token_accuracy"].of_tokens])
def test_standard_error_agrees_with_the_bootstrap(metric) -> None:
    data = scores()

    def again(draw: np.ndarray) -> Estimate:
        return metric(TokenScores(data.losses[draw], data.counts[draw], data.correct[draw]))

    assert metric(data).standard_error == pytest.approx(resampled_error(again, len(data.counts)), rel=0.1)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_standard_error_of_labels_agrees_with_the_bootstrap(metric) -> None:
    generator = np.random.default_rng(2)
    expected = generator.integers(0, 3, 300)
    predicted = np.where(generator.random(300) < 0.7, expected, generator.integers(0, 4, 300))

    def again(draw: np.ndarray) -> Estimate:
        return metric(predicted[draw].tolist(), expected[draw].tolist())

    everything = metric(predicted.tolist(), expected.tolist())
    assert everything.standard_error == pytest.approx(resampled_error(again, 300, 800), rel=0.1)


def test_influences_add_up_to_nothing() -> None:
    for estimate in (perplexity(scores()), macro_f1(list("abcab"), list("abbaa")), span_f1([["B-X"]], [["B-X"]])):
        assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)


def test_one_sample_has_no_error() -> None:
    assert math.isnan(ratio([2.0], [4.0]).standard_error)


def test_overflow_is_capped() -> None:
    assert math.isfinite(perplexity(few([9000.0, 8000.0], [1, 1])).value)


# -- labels ---------------------------------------------------------------------------------------------------------


def test_macro_f1_by_hand() -> None:
    """a: precision 2/3, recall 1; b: precision 1, recall 1/3; `c` is no class of the data."""
    predicted, expected = list("aabca"), list("aabbb")
    assert macro_f1(predicted, expected).value == pytest.approx((4 / 5 + 2 / 4) / 2)
    assert accuracy(predicted, expected).value == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("I-PER I-PER O", {("PER", 0, 1)}),  # conlleval reads IOB1, too
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("B-A I-A E-A S-A", {("A", 0, 2), ("A", 3, 3)}),
        ("O O", set()),
    ],
)
def test_spans(labels: str, expected: set[tuple[str, int, int]]) -> None:
    assert spans(labels.split()) == expected


def test_span_f1_by_hand() -> None:
    """Of 3 expected and 3 found spans 1 is the same: a wrong type and a wrong border count as nothing."""
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "I-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["B-ORG", "O"]]
    assert span_f1(predicted, expected).value == pytest.approx(1 / 3)
    assert span_f1([["O"]], [["O"]]).value == 0


# -- answers --------------------------------------------------------------------------------------------------------


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
    assert (texts.exact_match(generated, expected), texts.contains(generated, expected)) == (same, inside)


@pytest.mark.parametrize(
    ("generated", "expected", "value"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 5 / 6),
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin's example: no stemming here
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d", "d c b a", 1 / 4),
        ("A-B_c!", "a b C", 1),
        ("", "a", 0),
        ("über alles", "Über Alles", 1),
    ],
)
def test_rouge_l(generated: str, expected: str, value: float) -> None:
    assert texts.rouge_l(generated, expected) == pytest.approx(value)


def test_token_f1() -> None:
    assert texts.token_f1("d c b a", "a b c d") == 1
    assert texts.token_f1("a a b", "a b b c") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert texts.token_f1("", "") == 0


@pytest.mark.parametrize(
    ("generated", "expected", "same", "shared"),
    [
        ("The Denver Broncos!", "denver broncos", 1, 1),
        ("Denver", "the Denver Broncos", 0, 2 / 3),
        ("an apple a day", "apple, day", 1, 1),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("something", "", 0, 0),
    ],
)
def test_squad(generated: str, expected: str, same: float, shared: float) -> None:
    assert texts.qa_em(generated, expected) == same
    assert texts.qa_f1(generated, expected) == pytest.approx(shared)


def test_patterns() -> None:
    number = texts.pattern_match(r"#### *(-?\d+)", "--regex")
    assert [number(text, "so #### 42") for text in ("####42", "#### 41", "42", "")] == [1, 0, 0, 0]
    assert texts.pattern_match(r"^\w+@prod$", "--regex")("api@prod", "whatever") == 1
    with pytest.raises(InputError, match=r"--regex.*no regular expression"):
        texts.pattern_match("(", "--regex")


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_SECONDS", 0.05)
    with pytest.raises(InputError, match="for one answer"):
        texts.pattern_match(r"^(?:(a|ab|b)+)+$", "--regex")("ab" * 40 + "!", "")


def test_repetition() -> None:
    assert texts.repetition([1, 2, 3]) == 0
    assert texts.repetition([1, 2, 3, 4, 5]) == 0
    assert texts.repetition([7] * 8) == pytest.approx(4 / 5)


def test_writing() -> None:
    assert METRICS["stop_rate"].of_writing(Written([1], True)) == 1
    assert METRICS["stop_rate"].of_writing(Written([1], False)) == 0


# -- significance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1), (2, 8, 2 * (1 + 10 + 45) / 1024)],
)
def test_sign_test_by_hand(gained: int, lost: int, p: float) -> None:
    assert sign_test(gained, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (2.228, 10, 0.05), (3.169, 10, 0.01), (1.984, 100, 0.05), (0.0, 7, 1.0), (3.291, 10**7, 0.001)],
)
def test_t_test_agrees_with_the_tables(t: float, freedom: int, p: float) -> None:
    assert t_test(t, 1.0, freedom + 1) == pytest.approx(p, rel=2e-3)


def test_incomplete_beta() -> None:
    assert incomplete_beta(2, 3, 0.4) == pytest.approx(0.5248)  # 1 - .6^4 - 4 .4 .6^3, a binomial tail
    assert incomplete_beta(0.5, 0.5, 0.25) == pytest.approx(1 / 3)  # 2/pi asin(sqrt x)
    assert (incomplete_beta(2, 3, 0), incomplete_beta(2, 3, 1)) == (0, 1)


def test_the_test_that_fits_is_taken() -> None:
    base, tuned = mean([0, 0, 1, 0, 0, 1]), mean([1, 1, 0, 1, 1, 1])
    found = paired_test(tuned, base)
    assert (found.name, found.gained, found.lost, found.p) == (SIGN, 4, 1, pytest.approx(2 * 6 / 32))
    found = paired_test(mean([0.5, 1.0, 0.2]), mean([0.1, 0.9, 0.0]))
    differences = np.array([0.4, 0.1, 0.2])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert found.name == T and found.gained is None
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's distribution with two degrees of freedom


def test_p_is_uniform_where_there_is_nothing_to_find() -> None:
    generator = np.random.default_rng(3)
    found = [t_test(x.mean(), x.std(ddof=1) / math.sqrt(12), 12) for x in generator.normal(size=(2000, 12))]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_a_difference_without_spread_is_certain_and_none_is_nothing() -> None:
    assert t_test(0.1, 0.0, 5) == 0 and t_test(0.0, 0.0, 5) == 1 and math.isnan(t_test(1.0, math.nan, 1))


# -- the table ------------------------------------------------------------------------------------------------------


def test_thresholds_know_the_good_direction() -> None:
    up, down = METRICS["exact_match"].higher_is_better, METRICS["loss"].higher_is_better
    assert reaches(up, 0.6, 0.6) and not reaches(up, 0.59, 0.6)
    assert reaches(down, 0.5, 0.6) and not reaches(down, 0.61, 0.6)
    assert not any(reaches(metric.higher_is_better, math.nan, 0.5) for metric in METRICS.values())


def test_each_metric_is_computed_from_one_thing() -> None:
    for name, metric in known_metrics("a").items():
        kinds = (metric.of_tokens, metric.of_answer, metric.of_writing, metric.of_labels, metric.of_spans)
        assert sum(kind is not None for kind in kinds) == 1, name
        assert metric.meaning


def test_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="did you mean `exact_match`"):
        find("exactmatch", "--metrics")
    with pytest.raises(InputError, match="--regex PATTERN"):
        find("regex", "--metrics")
