"""Benchmarks of yes and no: POPE, MME and AMBER."""

import argparse
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from mindvlm.core.errors import counted
from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.benchmarks.short_answers import LLAVA, llava_questions
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import SHORT_ANSWER, Question, QuestionBenchmark, answered, id_of
from mindvlm.evaluation.scorers import amber, yes_no
from mindvlm.evaluation.submissions import write_json, write_text

POPE, POPE_CATEGORIES = "llava_pope_test.jsonl", ("adversarial", "popular", "random")
MME, YES_OR_NO = "MME_Benchmark_release_version", " Please answer yes or no."
AMBER = "github.com/junyangwang0410/AMBER"
SIMILARITY, LANGUAGE = 0.8, "en_core_web_lg"


def read_pope(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    """Finds the label of each question by picture and text; files of another order or other texts are paired too."""
    questions, found = llava_questions(files, POPE, "val2014"), []
    for category in POPE_CATEGORIES:
        labels = files.json_lines(f"coco/coco_pope_{category}.json")
        chosen = [one for one in questions if one.group == category]
        by_text = {(row["image"], row["text"]): row["label"] for row in labels}
        keys = [(one.images[0].name, one.prompt.split("\n")[0]) for one in chosen]
        if len(labels) != len(chosen):
            raise ValueError(f"{counted(len(labels), 'label')} for {counted(len(chosen), 'question')} in {POPE}")
        if by_text.keys() != set(keys):
            if [row["image"] for row in labels] != [name for name, _ in keys]:
                raise ValueError("its pictures are not those of the questions")
            by_text = dict(zip(keys, (row["label"] for row in labels), strict=True))
        for one, key in zip(chosen, keys, strict=True):
            found.append(Question(one.id, one.prompt, one.images, by_text[key], category, one.written))
    return found


def tabulate_pope(scored: Sequence[Weighted]) -> Rows:
    """Returns the figures of each category in percent and their means; papers report the mean F1."""
    rows: Rows = {}
    for category in POPE_CATEGORIES:
        pairs = weighed((question.group == category, (verdict, question.truth), n) for question, verdict, n in scored)
        if pairs:
            figures = yes_no.Confusion.of(pairs).figures()
            rows[category] = {"questions": pairs.total(), **{key: 100 * value for key, value in figures.items()}}
    metrics = list(next(iter(rows.values())))[1:]
    means = {key: sum(figures[key] for figures in rows.values()) / len(rows) for key in metrics}
    return rows | {"mean of categories": {"questions": sum(row["questions"] for row in rows.values()), **means}}


def weighed(items: Iterable[tuple[bool, Hashable, int]]) -> Counter:
    """Returns how often each value counts, of those that are wanted."""
    found: Counter = Counter()
    for is_wanted, value, count in items:
        if is_wanted:
            found[value] += count
    return found


def read_mme(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    root, found = files.path(MME), []
    for task in (*yes_no.PERCEPTION, *yes_no.COGNITION):
        divided = (root / task / "questions_answers_YN").is_dir()
        texts, pictures = (
            root / task / name if divided else root / task for name in ("questions_answers_YN", "images")
        )
        shown = {path.stem: path for path in sorted(pictures.glob("*")) if path.suffix in (".jpg", ".png")}
        for path in sorted(texts.glob("*.txt")):
            picture = shown.get(path.stem, pictures / f"{path.stem}.jpg")
            for line in files.text(str(path.relative_to(files.root))).splitlines():
                question, truth = line.split("\t")[:2]
                name = f"{task}/{picture.name}"
                key = mme_key({"question_id": name, "prompt": question})
                prompt = question.replace(YES_OR_NO.strip(), "").strip() + SHORT_ANSWER
                found.append(Question(key, prompt, (picture,), (question, truth), task, {"question_id": name}))
    return found


def mme_key(row: Mapping) -> str:
    """Returns picture and question, because the question ids of LLaVA's file are those of the pictures."""
    question = " ".join(row["prompt"].replace(SHORT_ANSWER.strip(), "").split())
    picture = Path(id_of(row)).with_suffix("")
    return f"{picture} {question if YES_OR_NO.strip() in question else question + YES_OR_NO}"


def tabulate_mme(scored: Sequence[Weighted]) -> Rows:
    by_task: dict[str, list[tuple[str, bool, int]]] = {}
    for question, verdict, count in scored:
        by_task.setdefault(question.group, []).append((question.written["question_id"], verdict, count))
    scores = {task: yes_no.mme_score(verdicts) for task, verdicts in by_task.items()}
    rows = {name: {"score": score} for name, score in yes_no.mme_totals(scores).items()}
    return rows | {
        task: {"questions": sum(count for *_, count in verdicts), "score": scores[task]}
        for task, verdicts in by_task.items()
    }


def submit_mme(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the files that the official program of MME scores."""
    lines: dict[str, list[str]] = {}
    for one, text in answered(questions, answers):
        name = Path(one.written["question_id"]).stem + ".txt"
        lines.setdefault(one.group, []).append("\t".join((name, *one.truth, " ".join(text.split()))) + "\n")
    return [write_text(output / "mme_answers" / f"{task}.txt", "".join(rows)) for task, rows in lines.items()]


def read_amber(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    association = files.json("data/relation.json")
    safe_words = files.text("data/safe_words.txt").split("\n")
    annotations, found = files.json("data/annotations.json"), []
    for row in files.json("data/query/query_all.json"):
        annotation = annotations[row["id"] - 1]
        is_description = annotation["type"] == "generative"
        prompt = row["query"] + ("" if is_description else SHORT_ANSWER)
        truth = {**annotation, "association": association, "safe_words": safe_words}
        images = (files.root / "image" / row["image"],)
        group = "generative" if is_description else annotation["type"]
        found.append(Question(str(row["id"]), prompt, images, truth, group, {"question_id": row["id"]}))
    return found


def amber_verdict(question: Question, answer: Answer) -> amber.Mentions | str | None:
    """Returns the answer to a question, or what a description mentions; None without the tools for that."""
    if question.group != "generative":
        return answer["text"]
    if missing_tools():
        return None
    nouns, is_similar = language_tools()
    truth = question.truth
    return amber.mentions(
        nouns(answer["text"]),
        truth["truth"],
        truth["hallu"],
        association=truth["association"],
        safe_words=truth["safe_words"],
        is_similar=is_similar,
    )


@cache
def missing_tools() -> str:
    """Returns which tools for descriptions are not installed, and how to install them; empty if there are all."""
    missing = []
    try:
        from nltk import pos_tag, word_tokenize
        from nltk.stem import WordNetLemmatizer
    except ImportError:
        missing.append("nltk (pip install nltk), and its punkt_tab, averaged_perceptron_tagger_eng and wordnet")
    else:
        uses = {
            "punkt_tab": lambda: word_tokenize("a test"),
            "averaged_perceptron_tagger_eng": lambda: pos_tag(["test"]),
            "wordnet": lambda: WordNetLemmatizer().lemmatize("tests"),
        }
        for name, use in uses.items():
            try:
                use()
            except LookupError:
                missing.append(f"NLTK's {name} (python -m nltk.downloader {name})")
    try:
        load_language()
    except ImportError:
        missing.append(f"spacy (pip install spacy), and its {LANGUAGE} (python -m spacy download {LANGUAGE})")
    except OSError:
        missing.append(f"spaCy's {LANGUAGE} (python -m spacy download {LANGUAGE})")
    return f"descriptions need {'; '.join(missing)}" if missing else ""


@cache
def load_language() -> Callable:
    """Returns spaCy's model with word vectors. Raises ImportError or OSError if it is not installed."""
    import spacy

    return spacy.load(LANGUAGE)


@cache
def language_tools() -> tuple[Callable[[str], list[str]], Callable[[str, str], bool]]:
    """Returns the official functions for nouns of a text and similarity of words."""
    from nltk import pos_tag, word_tokenize
    from nltk.stem import WordNetLemmatizer

    lemmatizer, document = WordNetLemmatizer(), cache(load_language())

    def nouns(text: str) -> list[str]:
        tagged = pos_tag(word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, kind in tagged if kind.startswith("NN")]

    return nouns, lambda first, second: document(first).similarity(document(second)) > SIMILARITY


def tabulate_amber(scored: Sequence[Weighted]) -> Rows:
    described = weighed((question.group == "generative", verdict, count) for question, verdict, count in scored)
    pairs: dict[str, Counter] = {}
    for question, verdict, count in scored:
        if question.group != "generative":
            for name in amber.dimensions_of(question.group):
                pairs.setdefault(name, Counter())[verdict, question.truth["truth"]] += count
    rows: Rows = {}
    if described:
        rows["generative"] = {"questions": described.total(), **amber.description_figures(described)}
    for name, found in pairs.items():
        rows[name] = {"questions": found.total(), **amber.answer_figures(found, name)}
    if described and pairs:
        score = (100 - rows["generative"]["chair"] + rows["discriminative"]["f1"]) / 2
        total = rows["generative"]["questions"] + rows["discriminative"]["questions"]
        rows["AMBER"] = {"questions": total, "score": score}
    return rows


def submit_amber(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = [{"id": one.written["question_id"], "response": text} for one, text in answered(questions, answers)]
    return [write_json(output / "amber_responses.json", rows)]


ENTRIES = {
    "pope": QuestionBenchmark(
        summary="POPE: objects that are not in the picture; accuracy, precision, recall and F1",
        needs={
            POPE: LLAVA,
            **{f"coco/coco_pope_{one}.json": "output/coco of github.com/AoiDragon/POPE" for one in POPE_CATEGORIES},
        },
        pictures={"val2014": "http://images.cocodataset.org/zips/val2014.zip"},
        read=read_pope,
        verdict=lambda question, answer: yes_no.pope_answer(answer["text"]),
        tabulate=tabulate_pope,
        kind=lambda question: (question.group, question.truth),
        headline=("mean of categories", "f1"),
    ),
    "mme": QuestionBenchmark(
        summary="MME: perception (at most 2000) and cognition (at most 800)",
        needs={
            MME: "MME_Benchmark_release_version.zip, see the branch Evaluation of "
            "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
        },
        read=read_mme,
        key=mme_key,
        verdict=lambda question, answer: yes_no.mme_answer(answer["text"]) == question.truth[1].lower(),
        tabulate=tabulate_mme,
        unit=lambda question: question.written["question_id"],
        headline=("perception", "score"),
        submit=submit_mme,
    ),
    "amber": QuestionBenchmark(
        summary="AMBER: hallucinations in descriptions (needs NLTK and spaCy) and in answers of yes or no",
        needs=dict.fromkeys(
            ("data/query/query_all.json", "data/annotations.json", "data/relation.json", "data/safe_words.txt"), AMBER
        ),
        pictures={"image": f"AMBER.zip, see {AMBER}"},
        read=read_amber,
        post=str.capitalize,
        verdict=amber_verdict,
        unscored=missing_tools,
        tabulate=tabulate_amber,
        kind=lambda question: (question.group, question.truth["truth"] if question.group != "generative" else None),
        headline=("discriminative", "f1"),
        submit=submit_amber,
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
