"""The scorers of lmms-eval and VLMEvalKit agree with those here where they have the same definition.

The table in docs/evaluation.md lists where the definitions differ; the last test checks an example of each row.
"""

import random

import pytest

from mindvlm.evaluation.scorers import amber, choices, documents, mathematics, short_answers, yes_no
from tests.evaluation.framework_sources import load

pytestmark = pytest.mark.ci
ODD_WORDS = """
    a A an The the two None ten dont wont wouldnt've yall let's shes James's 's ' '' cat Cats RED red, red. "red" 3 3.
    .5 -2 1,000 12% 1e3 well-known (x) [1] {b} ? ! ; / \\ @ ` < > _ = + yes no No Yes not Not yes. No, A. (B) B)
    C: answer is so final thus could be result Ä ß İ 你好 ... .. . , ,, - -- 5... x. $3 \\frac12 \\boxed{4} é
""".split()
SPACES = (" ", " ", " ", "", "  ", "\n", "\t", ", ", ". ", " \u00a0")


def odd_texts(seed: int, num_texts: int = 3000, words: list[str] = ODD_WORDS, spaces: tuple[str, ...] = SPACES):
    """Returns texts of up to eight words, the same ones for a seed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num_texts):
        parts = [rng.choice(words) + rng.choice(spaces) for _ in range(rng.randrange(9))]
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def evalai():
    return load("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()


@pytest.fixture(scope="module")
def vlmevalkit():
    """The scorer of VLMEvalKit for short answers."""
    misc = load("vlmeval.smp.misc")
    names = ("process_punctuation", "istype", "listinstr")
    return load("vlmeval.dataset.utils.vqa_eval", **{name: getattr(misc, name) for name in names})


def test_normalisation_of_evalai(evalai):
    for text in odd_texts(1):
        assert short_answers.normalised(text) == evalai(text), repr(text)


def test_soft_accuracy_of_lmms_eval(evalai):
    theirs = load("lmms_eval.tasks.textvqa.utils", EvalAIAnswerProcessor=type(evalai))
    rng = random.Random(2)
    for text in odd_texts(3, 500):
        answers = [rng.choice([text, text.upper(), f"the {text}", "x", "2"]) for _ in range(10)]
        found = theirs.textvqa_process_results({"answers": list(answers), "question_id": 1}, [text])
        assert short_answers.textvqa_score(text, answers) == pytest.approx(found["exact_match"]), (text, answers)


def test_soft_accuracy_of_vlmevalkit(vlmevalkit):
    # without commas, question marks and 's, which VLMEvalKit does not remove first
    words = [word for word in ODD_WORDS if not set(word) & set(",?'")]
    rng = random.Random(4)
    for text in odd_texts(5, 500, words, (" ", "  ", "\n", "-")):
        answers = [rng.choice([text, text.upper(), f"the {text}", "x", "2"]) for _ in range(10)]
        line = vlmevalkit.process_line({"answer": str(answers), "prediction": text}, "vqa_score")
        (found,) = vlmevalkit.hit_calculate([line], "TextVQA_VAL")
        assert short_answers.textvqa_score(text, answers) == pytest.approx(found), (text, answers)


def odd_pairs(seed: int, num_pairs: int = 3000):
    """Returns pairs of answer and truth, about half of them numbers that are near each other."""
    rng = random.Random(seed)
    texts = odd_texts(seed, num_pairs)
    for text in texts:
        value = rng.choice([0, 1, 0.05, 7, 20, 100, 12345.6, -3])
        near = value * rng.choice([1, 1.05, 0.95, 1.0501, 0.9499, 1.04, 2, -1])
        forms = [
            f"{near}",
            f"{near}%",
            f"{near * 100}%",
            f"{near:g}",
            f"{near:.2f}",
            text,
            f" {near}",
            "nan",
            "inf",
            "1_0",
        ]
        yield rng.choice(forms), rng.choice([f"{value}", f"{value:g}", f"{value}%", text, text.swapcase()])


def test_relaxed_accuracy(vlmevalkit):
    theirs = load("lmms_eval.tasks.chartqa.utils")
    for answer, truth in odd_pairs(6):
        ours = short_answers.relaxed_match(answer, truth)
        assert ours == theirs.relaxed_correctness(answer, truth), (answer, truth)
        assert ours == vlmevalkit.relaxed_correctness(truth, answer), (answer, truth)


def test_anls(vlmevalkit):
    theirs = load("lmms_eval.api.metrics")
    rng = random.Random(7)
    for text in odd_texts(8):
        answers = [
            "".join(rng.sample(text, len(text)))[: rng.randrange(1, 30)] or "x",
            text[: rng.randrange(20)].upper(),
        ]
        line = vlmevalkit.process_line({"answer": str(answers), "prediction": text}, "anls")
        (found,) = vlmevalkit.hit_calculate([line], "DocVQA_VAL")
        assert documents.anls(text, answers) == pytest.approx(found), (text, answers)
        assert documents.anls(text, answers) == pytest.approx(theirs.anls(answers, [text])["anls"]), (text, answers)


def test_figures_of_pope():
    theirs = load("lmms_eval.tasks.pope.utils")
    rng = random.Random(9)
    for size in (1, 2, 3, 50):
        for _ in range(20):
            pairs = [(rng.choice(["yes", "no"]), rng.choice(["yes", "no"])) for _ in range(size)]
            rows = [
                result["pope_accuracy"]
                for answer, truth in pairs
                for result in [theirs.pope_process_results({"answer": truth, "question_id": 0}, [f"{answer.title()} "])]
            ]
            ours = yes_no.Confusion.of({pair: pairs.count(pair) for pair in pairs}).figures()
            for key, value in ours.items():
                name = {"f1": "f1_score"}.get(key, key)
                if key == "yes_ratio":
                    continue
                found = getattr(theirs, f"pope_aggregate_{name}")(rows)
                # what is not defined is 0 there
                assert found == (pytest.approx(value) if value == value else 0), (key, pairs)


def test_answers_and_scores_of_mme():
    theirs = load("lmms_eval.tasks.mme.utils")
    # without full stops and white space at the ends and single letters, on which lmms-eval has rules of its own
    words = [
        "yes",
        "Yes",
        "NO",
        "no",
        "not",
        "nope",
        "yesterday",
        "I",
        "would",
        "say,",
        "It",
        "is",
        "other",
        "ye",
        "know",
    ]
    for text in odd_texts(10, 3000, words, (" ", ", ", "", "\n")):
        text = text.strip()
        if len(text) > 1:
            assert yes_no.mme_answer(text) == theirs.parse_pred_ans(text), repr(text)
    rng = random.Random(11)
    rows = [
        (task, str(picture), rng.random() < 0.7) for task in ("count", "OCR") for picture in range(30) for _ in "ab"
    ]
    scores = {
        task: yes_no.mme_score([(picture, right, 1) for name, picture, right in rows if name == task])
        for task in ("count", "OCR")
    }
    results = [{"question_id": picture, "category": task, "score": float(right)} for task, picture, right in rows]
    assert yes_no.mme_totals(scores)["perception"] == pytest.approx(theirs.mme_aggregate_results(results))


def test_open_answers_of_mmmu():
    theirs = load("lmms_eval.tasks.mmmu.utils")
    rng = random.Random(12)
    truths = ["3", "3.0", "1,000", "x", "cat", "red cats", "-2", "0.5", "1e3", "1000", "b"]
    for text in odd_texts(13, 6000):
        truth = rng.choice([rng.choice(truths), rng.sample(truths, 2)])
        found = theirs.eval_open(truth, theirs.parse_open_response(text))
        assert choices.is_open_match(text, truth) == found, (text, truth)


def test_choices_of_mmmu():
    theirs = load("lmms_eval.tasks._task_utils.mmmu_mcq_utils")
    options = {"A": "red cat", "B": "Dog", "C": "the red cat", "D": "3"}
    words = ["(A)", "(B)", "(D)", "red cat", "DOG", "the", "it", "must", "be", "3", "because", "of", "or", "perhaps"]
    # letters without parentheses are where lmms-eval has rules of its own
    for text in odd_texts(14, 6000, words, (" ", " ", "\n", ", ", "! ")):
        ours = choices.option_letter(text, options)
        if ours is not None:
            assert ours == theirs.parse_mmmu_multi_choice_response(text, list(options), options), repr(text)


@pytest.fixture(scope="module")
def mathvista():
    module = load("lmms_eval.tasks.mathvista.mathvista_evals")
    from rapidfuzz.distance import Levenshtein

    module.distance = Levenshtein.distance
    return object.__new__(module.MathVistaEvaluator)


def test_answers_of_mathvista(mathvista):
    rng = random.Random(15)
    options = ["Yes", "No", "3/11", "8 cm", "(b) x"]
    words = [*ODD_WORDS, "(B)", "(c)", "A", "C", "E", "F", "3.14159", "2.5", "-7", "1e400", "nan", *options]
    for text in [*words, *odd_texts(16, 4000, words, ("", " ", ""))]:
        question = {
            "question_type": rng.choice(["multi_choice", "free_form"]),
            "answer_type": rng.choice(["text", "integer", "float", "list"]),
            "choices": options,
        }
        precision = rng.choice([1.0, 2.0, 0.0])
        ours = mathematics.mathvista_answer(text, **question, precision=precision)
        found = mathvista.normalize_extracted_answer(
            text, options, question["question_type"], question["answer_type"], int(precision)
        )
        assert ours == found, (text, question)
        mathvista.get_chat_response = lambda *arguments, **options: "a judge is asked"
        asked = mathvista.extract_answer(text, {**question, "query": ""})
        assert (mathematics.quick_extraction(text, **question) or ("" if text == "" else "a judge is asked")) == asked


def test_answers_of_mathvision():
    found = load("lmms_eval.tasks.mathvision.eval_utils")
    theirs = load("lmms_eval.tasks.mathvision.utils", is_number=found.is_number)
    kept = []
    # what is left of an answer is compared with the truth; the value of LaTeX needs a package and is compared elsewhere
    theirs.find_math_answer, theirs.is_equal = found.find_math_answer, lambda truth, answer: kept.append(answer)
    words = [
        *ODD_WORDS, "the answer is", "The final answer is", "the answer should be", "the correct answer is", "So it",
        "is", "(A)", "(B).", "A\n", "\\boxed{\\frac{1}{2}}", "\\boxed{", "}", "{}", "\\sqrt2", "\\sqrt{3}", "\\dfrac12",
        "1/2", "0.5", ".5", "x=3", "y\\approx 4", "30^\\circ", "5\\%", "\\text{ cm}", "2km", "(1,2)", "∞",
        "$4$", "\\left(1\\right)",
    ]  # fmt: skip
    for text in odd_texts(17, 6000, words):
        theirs.mathvision_process_results({"answer": "A", "options": []}, [text])
        assert mathematics.mathvision_answer(text) == kept[-1], repr(text)


def test_boxes_of_refcoco():
    theirs = load("lmms_eval.tasks.refcoco.utils_rec")
    rng = random.Random(18)
    for _ in range(2000):
        left, top, right, bottom = (round(rng.random(), rng.choice([1, 2, 3])) for _ in range(4))
        truth = (0.2, 0.1, 0.6, 0.9)
        text = f"the cat: [{left}, {top},{right}, {bottom} ] or [0, 0, 1, 1]"
        box = documents.first_box(text)
        assert list(box) == theirs.parse_float_sequence_within(text)
        if left < right and top < bottom:
            assert documents.intersection_over_union(box, truth) == pytest.approx(theirs.compute_iou(box, truth))
            is_right = documents.intersection_over_union(box, truth) >= 0.5
            assert is_right == theirs.compute_accuracy(truth, box)


def test_descriptions_and_answers_of_amber():
    theirs = load("lmms_eval.tasks.amber_g.utils")
    rng = random.Random(19)
    association = {"sky": ["heaven", "cloud"], "ship": ["boat"], "dog": ["puppy"], "light": [], "tree": ["sky"]}
    vocabulary = {*association, *(word for words in association.values() for word in words)}
    safe_words = ["light", "cloud"]
    alike = {("boat", "ship"), ("heaven", "sky"), ("puppy", "tree"), ("tree", "dog")}
    theirs.check_synonyms_word = lambda noun, word, threshold: (noun, word) in alike
    theirs.extract_nouns = str.split
    # as the official file of figures has them
    parts = ["chair", "safe_cover", "hallu_cover", "non_hallu", "qa_correct", "qa_no", "qa_ans_no"]
    parts += [f"{kind}_{name}" for kind in ("as", "an", "aa", "ha", "asso") for name in parts[4:]]
    for _ in range(300):
        totals = {f"{part}_{name}": start for part in parts for name, start in (("num", 0.001), ("score", 0))}
        described: dict = {}
        for _ in range(rng.randrange(1, 6)):
            nouns = [rng.choice([*sorted(vocabulary), "stone"]) for _ in range(rng.randrange(7))]
            truth = {kind: rng.sample(sorted(association), rng.randrange(1, 4)) for kind in ("truth", "hallu")}
            theirs.process_generative_task(
                {"question_id": 1, "text": " ".join(nouns)}, truth, association, vocabulary, safe_words, 0.8, totals
            )
            found = amber.mentions(
                nouns, truth["truth"], truth["hallu"], association=association, safe_words=safe_words,
                is_similar=lambda noun, word: (noun, word) in alike,
            )  # fmt: skip
            described[found] = described.get(found, 0) + 1
        figures = amber.description_figures(described)
        for name, value in figures.items():
            assert value == pytest.approx(getattr(theirs, f"amber_g_aggregate_{name}")([totals]), abs=0.0501), name


@pytest.mark.parametrize("words", [ODD_WORDS, ["你好", "世界", "a", "cat", "。"]])
def test_page_ocr(words):
    pytest.importorskip("jieba")
    theirs = load("vlmeval.dataset.utils.Ocrbench_v2.page_ocr_metric")
    # WordNet may not be installed; the same function computes METEOR on both sides
    theirs.meteor_score.meteor_score = lambda truths, read: len(read)
    rng = random.Random(20)
    for text in odd_texts(21, 300, words, (" ", "\n", "  ")):
        truth = text if rng.random() < 0.2 else f"{text[rng.randrange(len(text) + 1) :]} {rng.choice(words)} cat"
        if not text.split() or not truth.split():
            continue
        found = theirs.cal_per_metrics(text, truth)
        ours = documents.page_figures(text, truth, lambda true, read: len(read))
        names = {"edit_dist": "edit_distance", "f_measure": "f1"}
        for name, value in found.items():
            assert ours[names.get(name, name)] == pytest.approx(value or 0, abs=1e-12), (name, text, truth)
