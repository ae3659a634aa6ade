"""Scorers on values that are known by definition; tests/test_golden.py compares them with the original programs."""

import math

import pytest

from mindvlm.evaluation.bootstrap import confidence_intervals
from mindvlm.evaluation.questions import Question, mean_of
from mindvlm.evaluation.scorers import amber, choices, documents, judged, mathematics, short_answers, yes_no


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The two dogs.", "2 dogs"),
        ("1,234.5", "1234.5"),
        ("dont know", "don't know"),
        ("well-known", "well known"),
        ("well - known", "well known"),
        ("James's", "james 's"),
        ("none", "0"),
        ("3.", "3"),
        ("yall'd've", "y'all'd've"),
        ("." * 40 + "a", "........a"),
    ],
)
def test_normalisation_of_evalai(text, expected):
    assert short_answers.normalised(text) == expected


def test_soft_accuracy_of_textvqa():
    answers = ["stop"] * 4 + ["go"] * 6
    assert short_answers.textvqa_score("Stop!", answers) == 1
    # three annotators have two others each, the other seven three
    assert short_answers.answer_scores(["x"] * 3 + ["y"] * 7)["x"] == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert short_answers.textvqa_score("left", answers) == 0


@pytest.mark.parametrize(
    "answer, truth, expected",
    [("104", "100", True), ("106", "100", False), ("95.2", "100", True), ("12%", "0.12", True), ("Blue", "blue", True),
     ("0.0", "0", False), ("0", "0", True), ("x", "1", False)],
)  # fmt: skip
def test_relaxed_accuracy_measures_from_the_truth(answer, truth, expected):
    assert short_answers.relaxed_match(answer, truth) == expected


def test_figures_of_pope_without_an_answer_of_a_kind():
    figures = yes_no.Confusion.of({("no", "no"): 3, ("no", "yes"): 1}).figures()
    assert figures["accuracy"] == 0.75 and figures["f1"] == 0 and math.isnan(figures["precision"])
    assert math.isnan(yes_no.Confusion.of({("no", "no"): 3}).figures()["f1"])


def test_mme_counts_pictures_with_only_right_answers():
    assert yes_no.mme_score([("a", True, 1), ("a", True, 1), ("b", True, 1), ("b", False, 1)]) == 75 + 50
    assert yes_no.mme_answer("Yes, it is") == "yes" and yes_no.mme_answer("It is") == "other"


def test_options_of_mmmu():
    options = {"A": "red cat", "B": "dog"}
    assert choices.option_letter("The answer is (B).", options) == "B"
    assert choices.option_letter("A or B", options) == "B"
    assert choices.option_letter("I think it must be the Red Cat", options) == "A"
    assert choices.option_letter("perhaps", options) is None
    assert choices.is_open_match("So the sum is 1,200.", "1200") and not choices.is_open_match("It is 12.", "1200")
    assert choices.is_open_match(" X. ", "x") and not choices.is_open_match("box", "x")


@pytest.mark.parametrize(
    "text, value",
    [("\\frac{1}{2}", 0.5), ("2\\sqrt{9}", 6), ("-3+4*2", 5), ("2^{10}", 1024), ("$4 \\pi$", 4 * math.pi),
     ("(1+2)/4", 0.75), ("x", None), ("2^{10^{10}}", None), ("1/0", None), ("", None), ("__import__", None),
     ("(" * 10000, None)],
)  # fmt: skip
def test_value_of_latex(text, value):
    assert mathematics.latex_value(text) == (value if value is None else pytest.approx(value))


def test_answers_of_mathvision():
    assert mathematics.mathvision_answer("So it is $\\boxed{\\frac12}$.") == "\\frac12"
    assert mathematics.is_equal_answer("0.5", "\\frac{1}{2}") and not mathematics.is_equal_answer("", "")
    assert mathematics.is_equal_answer("(1/2,3)", "(0.5,3)")


def test_mentions_of_amber():
    found = amber.mentions(
        ["heaven", "dog", "boat", "light", "stone"],
        ["sky", "ship"],
        ["dog"],
        association={"sky": ["heaven"], "ship": [], "dog": [], "boat": [], "light": []},
        safe_words=["light"],
        is_similar=lambda noun, word: (noun, word) == ("boat", "ship"),
    )
    # "stone" is in no list; "dog" is imagined; "boat" is similar to the ship
    assert found == amber.Mentions(nouns=4, hallucinated=1, truths=2, covered=2, traps=1, trapped=1)


def test_anls():
    assert documents.anls("ann lee", ["Ann  Lee"]) == 1
    assert documents.anls("ann leo", ["x", "Ann Lee"]) == pytest.approx(6 / 7)
    assert documents.anls("abcd", ["abxy"]) == 0.5 and documents.anls("abcde", ["abxyz"]) == 0
    assert documents.anls("", [""]) == 1 and documents.anls("", ["a"]) == 0
    # the distance ignores the second space, the length does not
    assert documents.anls("ab  cd", ["ab cx"]) == pytest.approx(5 / 6)


def test_page_figures_are_those_of_nltk():
    nltk = pytest.importorskip("nltk")
    text, truth = "the cat sat on a mat the cat", "the cat sat on the mat today"
    figures = documents.page_figures(text, truth, lambda true, read: 0.5)
    assert figures["bleu"] == pytest.approx(nltk.translate.bleu([truth.split()], text.split()))
    assert figures["edit_distance"] == pytest.approx(nltk.edit_distance(text, truth) / max(len(text), len(truth)))
    assert (figures["precision"], figures["recall"], figures["meteor"]) == (5 / 6, 5 / 6, 0.5)
    assert documents.page_figures("", truth, None)["bleu"] == 0


def test_chinese_pages_are_cut_into_words():
    pytest.importorskip("jieba")
    figures = documents.page_figures("我来到北京", "我来到北京清华大学", None)
    assert figures["precision"] == 1 and figures["recall"] == pytest.approx(3 / 4)


def test_boxes():
    assert documents.first_box("the cat: [009, 100, 500, 1000]") == (0.009, 0.1, 0.5, 1)
    assert documents.first_box("[0.1, 0.2, 0.3, 1.0]") == (0.1, 0.2, 0.3, 1)
    assert documents.first_box("[1, 2, 3]") is None
    assert documents.intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert documents.intersection_over_union((0, 0, 1, 1), (1, 1, 2, 2)) == 0


def test_replies_of_judges():
    assert judged.review_scores("8 7.5\nbecause") == (8, 7.5) and judged.review_scores("8,7") == (8, 7)
    assert judged.review_scores("Scores: 8 7") is None and judged.review_scores("") is None
    assert judged.hallucination_rating("Rating: 6") == 6 and judged.hallucination_rating("rating: 3, rating: 4") is None
    assert judged.judgement("Judgement: 1") is True and judged.judgement("maybe") is None


def test_an_interval_is_that_of_the_normal_approximation():
    scored = [(Question(str(n), ""), n % 4 == 0, 1) for n in range(1000)]
    mean = mean_of("accuracy")
    for kind in (lambda question: question.id, lambda question: None):
        low, high = confidence_intervals(mean, scored, lambda question: question.id, kind)["all"]["accuracy"]
        half = 196 * math.sqrt(0.25 * 0.75 / 1000)
        assert low == pytest.approx(25 - half, abs=0.4) and high == pytest.approx(25 + half, abs=0.4)
    # units of ten equal verdicts vary as a tenth as many questions do
    scored = [(Question(str(n), ""), n // 10 % 4 == 0, 1) for n in range(1000)]
    wide = confidence_intervals(mean, scored, lambda question: int(question.id) // 10, lambda question: None)
    low, high = wide["all"]["accuracy"]
    assert (high - low) / 2 == pytest.approx(196 * math.sqrt(0.25 * 0.75 / 100), rel=0.1)
