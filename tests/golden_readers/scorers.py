"""Cases of scored answers: the files of an original program are scored by the production benchmarks.

The folder of TinyLLaVA has a folder for each scorer, that of SliME a JSON document for each.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.evaluation.answers import AnswerFiles, share
from mindvlm.evaluation.benchmark import Scores
from mindvlm.evaluation.benchmarks import get_benchmark
from mindvlm.evaluation.scorers import amber, choices, judged, short_answers, yes_no
from mindvlm.tools.evaluate import build_parser
from tests.golden_readers.case import Case
from tests.golden_readers.report import Report

# figures of this library are percentages
PERCENT = 100


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    return write_lines(path, [value])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scored(name: str, data: Path, answers: Path, output: Path, *argv: str) -> Scores:
    """Scores a file of answers as `mindvlm-evaluate --score` does."""
    options = build_parser(name).parse_args([*argv, "--score", str(answers)])
    questions = get_benchmark(name).open(data, options)
    files = AnswerFiles(name, None, questions, lenient=options.compat)
    files.read(answers)
    return questions.score(files.answers, answers.parent, output)


def is_scorers(case: Case) -> bool:
    return bool(scorer_folders(case.folder))


def scorer_folders(folder: Path) -> dict[Path, Callable[[Path, Path, Report], None]]:
    """Returns the folders of scorers in a folder, or the folder itself if it is one, with their readers."""
    return {
        path: read
        for path in (folder, *sorted(one for one in folder.iterdir() if one.is_dir()))
        for file, read in READERS.items()
        if (path / file).exists() and (path / "expected.json").exists() != (file == "rule.json")
    }


def read_scorers(case: Case, report: Report) -> None:
    with tempfile.TemporaryDirectory() as output:
        for number, (path, read) in enumerate(scorer_folders(case.folder).items()):
            folder = Path(output, str(number))
            folder.mkdir()
            read(path, folder, report)


def compare_textvqa(name: str, annotation: list, rows: list, expected: list[float], output: Path, report: Report):
    """Compares the score of each answer to TextVQA and their mean."""
    write_json(output / "TextVQA_0.5.1_val.json", {"data": annotation})
    questions = [{"question_id": row["question_id"], "image": "x", "text": row["prompt"]} for row in rows]
    write_lines(output / "llava_textvqa_val_v051_ocr.jsonl", questions)
    scores = scored("textvqa", output, write_lines(output / "a.jsonl", rows), output)
    truths = {(row["image_id"], row["question"].lower()): row["answers"] for row in annotation}
    keys = [(row["question_id"], short_answers.question_of_prompt(row["prompt"])) for row in rows]
    found = [short_answers.textvqa_score(row["text"], truths[key]) for row, key in zip(rows, keys, strict=True)]
    report.same(f"{name}: scores", [(str(key), *pair) for key, *pair in zip(keys, found, expected, strict=True)])
    mean = PERCENT * sum(expected) / len(expected)
    report.check(f"{name}: accuracy", abs(scores.tables["textvqa"]["all"]["accuracy"] - mean) / PERCENT, bound=1e-12)


def read_textvqa(folder: Path, output: Path, report: Report) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    normalised = json.loads((folder / "answer_normaliser.json").read_text())
    for name, pairs in normalised.items():
        report.same(f"normalised {name}", [(text, short_answers.normalised(text), to) for text, to in pairs])
    found = []
    for prompt, question in expected["prompt_processor"]:
        try:
            value = short_answers.question_of_prompt(prompt)
        except ValueError:
            value = None
        found.append((prompt, value, question if isinstance(question, str) else None))
    report.same("questions of prompts", found)
    annotation = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())["data"]
    values = [row["score"] for row in expected["per_sample"]]
    compare_textvqa("textvqa", annotation, lines(folder / "answers_a.jsonl"), values, output, report)
    report.skip("stvqa_accuracy", "ST-VQA is no benchmark of this library")


def compare_pope(data: Path, answers: Path, expected: dict, output: Path, report: Report) -> None:
    rows = scored("pope", data, answers, output).tables["pope"]
    for category, figures in expected.items():
        names = [name for name in figures if name in rows[category] and name != "questions"]
        errors = [abs(rows[category][name] - PERCENT * figures[name]) / PERCENT for name in names]
        report.check(f"pope: {category}", max(errors), bound=1e-12, note=", ".join(names))


def read_pope(folder: Path, output: Path, report: Report) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    compare_pope(folder, folder / "answers.jsonl", expected["categories"], output, report)
    report.same("pope answers", [(text, yes_no.pope_answer(text), to) for text, to in expected["text_to_answer"]])


def compare_scienceqa(data: Path, answers: Path, printed: str, expected: tuple, output: Path, report: Report):
    rows = scored("scienceqa", data, answers, output, "--compat").tables["scienceqa"]
    details, result = (
        json.loads((output / f"scienceqa_{name}").read_text()) for name in ("output.jsonl", "result.json")
    )
    line = (
        f"Total: {rows['all']['questions']}, Correct: {result['correct']}, Accuracy: {rows['all']['accuracy']:.2f}%, "
        f"IMG-Accuracy: {rows['with picture']['accuracy']:.2f}%"
    )
    report.same("scienceqa: printed", [("line", line, printed.strip())])
    report.same("scienceqa: output", [(key, details[key], rows) for key, rows in expected[0].items()])
    report.same("scienceqa: result", [(key, result[key], value) for key, value in expected[1].items()])


def read_scienceqa(folder: Path, output: Path, report: Report) -> None:
    expected = tuple(json.loads((folder / f"expected_{name}.json").read_text()) for name in ("output", "result"))
    printed = json.loads((folder / "expected.json").read_text())["main"]["stdout"]
    compare_scienceqa(folder, folder / "answers.jsonl", printed, expected, output, report)
    problems = json.loads((folder / "problems.json").read_text())
    built = json.loads((folder / "question_builder.json").read_text())["CQM-A"]
    report.same("CQM-A", [(key, choices.science_prompt(problems[key]), text) for key, (text, _) in built.items()])
    report.skip("other formats of question_builder.json", "only CQM-A is asked")


def read_converters(folder: Path, output: Path, report: Report) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    found = [short_answers.gqa_answer(row["text"]) for row in lines(folder / "gqa_answers.jsonl")]
    pairs = zip(found, expected["gqa"], strict=True)
    report.same("gqa", [(one["questionId"], text, one["prediction"]) for text, one in pairs])

    questions = folder / "llava_vqav2_mscoco_test2015.jsonl"
    for split in ("test", "test-dev"):
        write_lines(output / f"llava_vqav2_mscoco_{split}2015.jsonl", lines(questions))
    scored("vqav2", output, folder / "vqav2_merge.jsonl", output, "--compat")
    compare_document("vqav2", output / "vqav2_submission.json", expected["vqav2"], report)

    write_lines(output / "llava_test.jsonl", lines(folder / "vizwiz_test.jsonl"))
    scored("vizwiz", output, folder / "vizwiz_answers.jsonl", output, "--compat")
    compare_document("vizwiz", output / "vizwiz_submission.json", expected["vizwiz"], report)
    write_lines(output / "few.jsonl", lines_of(folder / "vizwiz_answers.jsonl")[1:])
    report.same("vizwiz: missing", [("refused", refused("vizwiz", output, output / "few.jsonl"), True)])

    answers = lines(folder / "mmvet_answers.jsonl")
    write_json(output / "mm-vet.json", {key: {"imagename": "x", "question": "q"} for key in expected["mmvet"]})
    scored("mm-vet", output, write_lines(output / "mmvet.jsonl", answers), output)
    compare_document("mm-vet", output / "mm-vet_submission.json", expected["mmvet"], report)

    annotation = json.loads((folder / "seed_bench.json").read_text())
    answers = lines(folder / "seed_answers.jsonl")
    compare_seed(annotation, answers, expected["seed_stdout"].splitlines(), expected["seed"], output, report)

    tsv = (folder / "mmbench_dev_tsv.txt").read_text()
    compare_mmbench(tsv, lines(folder / "mmbench_answers.jsonl"), expected["mmbench_xlsx"], output, report)
    options = build_parser("mmbench").parse_args(["--score", "x"])
    found = get_benchmark("mmbench").open(output, options).questions.values()
    given = [
        {"index": one.written["question_id"], "options": one.written["options"],
         "hint_is_none": choices.is_none(one.truth["hint"])}
        for one in found
    ]  # fmt: skip
    pairs = zip(given, expected["mmbench_options"], strict=True)
    report.same("mmbench: options", [(str(one["index"]), one, to) for one, to in pairs])
    report.same(
        "chunks", [(str(one), chunks(one["length"], one["parts"]), one["chunks"]) for one in expected["chunks"]]
    )


def chunks(length: int, parts: int) -> list[list[int]]:
    """Returns the shares of a number of questions that have some."""
    shares = [list(share(range(length), number, parts)) for number in range(parts)]
    return [one for one in shares if one]


def lines_of(path: Path) -> list[dict]:
    """Returns the lines of a file that are JSON."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def refused(name: str, data: Path, answers: Path) -> bool:
    try:
        scored(name, data, answers, data)
    except UserError:
        return True
    return False


def compare_document(name: str, path: Path, expected: list | dict, report: Report) -> None:
    found = json.loads(path.read_text())
    if isinstance(expected, dict):
        report.same(name, [(key, found.get(key), value) for key, value in expected.items()])
    else:
        pairs = zip(found, expected, strict=False)
        report.same(name, [("length", len(found), len(expected)), *((str(one), one, to) for one, to in pairs)])


def compare_seed(annotation: dict, answers: list, printed: list[str], upload: list, output: Path, report: Report):
    write_json(output / "SEED-Bench.json", annotation)
    questions = [{"question_id": row["question_id"], "image": "x", "text": "q"} for row in annotation["questions"]]
    write_lines(output / "llava-seed-bench.jsonl", questions)
    rows = scored("seed", output, write_lines(output / "seed.jsonl", answers), output).tables["seed"]
    names = [*annotation["question_type"], "all", "image", "video"]
    titles = [*annotation["question_type"], "Total accuracy", "image accuracy", "video accuracy"]
    pairs = zip(names, titles, strict=True)
    found = [f"{title}: {rows[name]['accuracy']:.2f}%" for name, title in pairs if name in rows]
    report.same("seed: printed", [(line, line, to) for line, to in zip(found, printed, strict=True)])
    found = lines(output / "seed_submission.jsonl")
    report.same("seed: upload", [("rows", found, upload)])


def compare_mmbench(tsv: str, answers: list, sheet: dict, output: Path, report: Report) -> None:
    import openpyxl

    (output / "mmbench_dev_20230712.tsv").write_text(tsv)
    scored("mmbench", output, write_lines(output / "mmbench.jsonl", answers), output, "--compat")
    book = openpyxl.load_workbook(output / "mmbench_submission.xlsx").active
    rows = [[cell.value for cell in row] for row in book.iter_rows()]
    expected = [sheet["columns"], *sheet["rows"]]
    report.same("mmbench: sheet", [(str(one), one, to) for one, to in zip(rows, expected, strict=True)])


def read_reviews(folder: Path, output: Path, report: Report) -> None:
    for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"):
        (output / name).write_bytes((folder / name).read_bytes())
    requests = json.loads((folder / "expected_requests.json").read_text())
    scored("llava-bench-wild", output, folder / "answers_model.jsonl", output)
    found = [row["body"] for row in lines(output / "judge_requests.jsonl")]
    report.same("requests", [(str(n), *pair) for n, pair in enumerate(zip(found, requests, strict=True))])
    ids = [row["question_id"] for row in lines(folder / "questions.jsonl")]
    replies = json.loads((folder / "judge_replies.json").read_text())
    rows = [{"custom_id": f"{key}#0", "content": reply} for key, reply in zip(ids, replies, strict=True)]
    write_lines(output / "judge_replies.jsonl", rows)
    figures = scored("llava-bench-wild", output, folder / "answers_model.jsonl", output, "--compat").tables
    expected = lines(folder / "expected_reviews.jsonl")
    found = lines(output / "reviews.jsonl")
    report.same("reviews", [(str(to["id"]), one, to) for one, to in zip(found, expected, strict=True)])
    summaries = json.loads((folder / "expected_summary.json").read_text())
    printed = summaries["select_tiny"]["stdout"].splitlines()[1:-1]
    report.same("summary", summary_pairs(figures["llava-bench-wild"], printed))
    values = [row["score"] for row in lines(folder / "reviews_without_category.jsonl")]
    printed = summaries["without_category"]["stdout"].splitlines()[1:-1]
    report.same("summary without category", summary_pairs({"all": judged.review_figures(values)}, printed))
    printed = summaries["version_0613"]["stdout"].splitlines()[1:-1]
    report.same("summary of clean reviews", summary_pairs(review_rows(lines(folder / "clean_reviews.jsonl")), printed))


def review_rows(reviews: list[dict]) -> dict[str, dict[str, float]]:
    """Returns the figures of reviews, of all and of each category."""
    groups: dict[str, list] = {"all": []}
    for row in reviews:
        for group in ("all", row["category"]):
            groups.setdefault(group, []).append(row["tuple"])
    return {name: judged.review_figures(groups[name]) for name in sorted(groups)}


def summary_pairs(rows: dict, printed: list[str]) -> list[tuple[str, str, str]]:
    """Returns lines as the original prints them, beside the printed ones."""
    found = [
        f"{name} {figures['ratio']:.1f} {figures['reference']:.1f} {figures['model']:.1f}"
        for name, figures in rows.items()
    ]
    return [("lines", found, printed)]


READERS: dict[str, Callable[[Path, Path, Report], None]] = {
    "answer_normaliser.json": read_textvqa,
    "coco": read_pope,
    "problems.json": read_scienceqa,
    "vqav2_merge.jsonl": read_converters,
    "rule.json": read_reviews,
}


def is_evaluation(case: Case) -> bool:
    return bool(DOCUMENTS.keys() & case.documents.keys()) and not case.weights.exists()


def read_evaluation(case: Case, report: Report) -> None:
    for name, document in case.documents.items():
        if name in DOCUMENTS:
            with tempfile.TemporaryDirectory() as output:
                DOCUMENTS[name](document, Path(output), report)
        else:
            report.skip(name, "no rule of this reader for a document of this name")


def read_chartqa(document: dict, output: Path, report: Report) -> None:
    rows = [{"imgname": "x", "query": "q", "label": entry["annotation"]} for entry in document["entries"]]
    write_json(output / "test/test_human.json", rows)
    write_json(output / "test/test_augmented.json", [])
    answers = output / "answers.json"
    answers.write_text(json.dumps(document["entries"]))
    table = scored("chartqa", output, answers, output, "--compat").tables["chartqa"]
    report.check(
        "relaxed accuracy",
        abs(table["human"]["relaxed_accuracy"] / PERCENT - document["relaxed_accuracy"]),
        bound=1e-12,
    )
    pairs = document["relaxed_correctness_pairs"]
    found = [(str(one), short_answers.relaxed_match(one["prediction"], one["target"]), one["correct"]) for one in pairs]
    report.same("relaxed matches", found)


def read_slime_textvqa(document: dict, output: Path, report: Report) -> None:
    report.same("normalised", [(text, short_answers.normalised(text), to) for text, to in document["normalisation"]])
    compare_textvqa("textvqa", document["annotation_data"], document["results"], document["per_sample"], output, report)


def read_slime_pope(document: dict, output: Path, report: Report) -> None:
    write_lines(output / "llava_pope_test.jsonl", document["questions"])
    for name, rows in document["annotations"].items():
        write_lines(output / "coco" / name, rows)
    compare_pope(output, write_lines(output / "a.jsonl", document["answers"]), document["scores"], output, report)


def read_slime_scienceqa(document: dict, output: Path, report: Report) -> None:
    write_json(output / "problems.json", document["problems"])
    write_json(output / "pid_splits.json", document["pid_splits"])
    answers = write_lines(output / "a.jsonl", document["predictions"])
    expected = (document["output_file"], document["output_result"])
    compare_scienceqa(output, answers, document["printed"], expected, output, report)
    converted = [
        (row["id"], choices.science_prompt(document["problems"][row["id"]]),
         row["conversations"][0]["value"].replace("<image>", "").strip())
        for row in document["convert_to_llava_CQM_A"]
    ]  # fmt: skip
    report.same("CQM-A", converted)
    report.skip("other formats", "only CQM-A is asked")


def read_slime_mmbench(document: dict, output: Path, report: Report) -> None:
    sheet = {"columns": document["sheet_columns"], "rows": document["sheet_rows"]}
    compare_mmbench(document["annotation_tsv"], document["results"], sheet, output, report)


def read_mme(document: dict, output: Path, report: Report) -> None:
    scores = {
        task: yes_no.mme_score([(row[0], yes_no.mme_answer(row[3]) == row[2].lower(), 1) for row in rows])
        for task, rows in document["result_lines"].items()
    }
    totals = yes_no.mme_totals(scores)
    for group, figures in document["scores"].items():
        errors = [
            abs((totals[group.lower()] if task == "total" else scores[task]) - to) for task, to in figures.items()
        ]
        report.check(f"mme: {group}", max(errors) / PERCENT, bound=1e-12, note=f"{len(errors)} scores")


def read_amber(document: dict, output: Path, report: Report) -> None:
    table, threshold = document["similarity_table"], document["similarity_threshold"]

    def is_similar(noun: str, word: str) -> bool:
        return (1.0 if noun == word else table.get(f"{noun}|{word}", 0)) > threshold

    descriptions, pairs = [], {}
    for row in document["responses"]:
        truth = document["annotations"][row["id"] - 1]
        if truth["type"] == "generative":
            found = amber.mentions(
                row["response"].split(), truth["truth"], truth["hallu"], association=document["word_association"],
                safe_words=document["safe_words"], is_similar=is_similar,
            )  # fmt: skip
            descriptions.append(found)
        else:
            for name in amber.dimensions_of(truth["type"]):
                pairs.setdefault(name, []).append((row["response"], truth["truth"]))
    rows = {name: amber.answer_figures(Counter(found), name) for name, found in pairs.items()}
    rows["generative"] = amber.description_figures(Counter(descriptions))
    titles = {"Generative Task": "generative", "Descriminative Task": "discriminative", "Exsitence": "existence"}
    for kind, tables in document["scores"].items():
        found = [
            (f"{title} {metric}", rows[titles.get(title, title.lower())][metric.lower()], value)
            for title, figures in tables.items()
            for metric, value in figures.items()
        ]
        report.same(f"amber: {kind}", found)


def read_conversions(document: dict, output: Path, report: Report) -> None:
    converted, answers = document["converted"], write_lines(output / "a.jsonl", document["results"])
    texts = {row["question_id"]: row["text"] for row in document["results"]}
    found = [
        (str(one), short_answers.gqa_answer(texts[one["questionId"]]), one["prediction"]) for one in converted["gqa"]
    ]
    report.same("gqa", found)
    for split in ("test", "test-dev"):
        write_lines(output / f"llava_vqav2_mscoco_{split}2015.jsonl", document["vqav2_questions"])
    scored("vqav2", output, answers, output, "--compat")
    compare_document("vqav2", output / "vqav2_submission.json", converted["vqav2"], report)
    write_lines(output / "llava_test.jsonl", document["vizwiz_questions"])
    scored("vizwiz", output, answers, output, "--compat")
    compare_document("vizwiz", output / "vizwiz_submission.json", converted["vizwiz"], report)
    write_json(output / "mm-vet.json", {key: {"imagename": "x", "question": "q"} for key in converted["mmvet"]})
    scored("mm-vet", output, answers, output)
    compare_document("mm-vet", output / "mm-vet_submission.json", converted["mmvet"], report)
    seed = converted["seed"]
    compare_seed(seed["annotation"], seed["results"], seed["printed"], seed["upload"], output, report)
    reviews = document["llava_bench"]
    report.same("llava-bench", summary_pairs(review_rows(reviews["reviews"]), reviews["printed"][1:-1]))
    contents = document["mmhal"]["contents"]
    ratings = [judged.hallucination_rating(one) or 0 for one in contents]
    types = [ratings[kind::8] for kind in range(8)]
    printed = [
        f"Average score: {sum(ratings) / len(ratings):.2f}",
        f"Hallucination rate: {sum(rating < judged.FAITHFUL_RATING for rating in ratings) / len(ratings):.2f}",
        f"Average score for each question type: {','.join(str(round(sum(one) / len(one), 2)) for one in types)}",
    ]
    report.same("mmhal", [("lines", printed, document["mmhal"]["printed"])])


RUNNERS = {"model_vqa_loader": "vqav2", "model_vqa_amber": "amber"}


class Scripted:
    """A model that gives recorded replies and keeps the questions."""

    def __init__(self, replies: list[str]):
        self.replies, self.asked = replies, []

    def generate_each(self, queries, num_queries, **options):
        for number, (query, _) in enumerate(queries):
            self.asked.append(query)
            yield number, self.replies[number].strip()


def read_runners(document: list[dict], output: Path, report: Report) -> None:
    """Compares prompts and lines of answers of the official loops; pictures are not read."""
    for number, run in enumerate(document):
        data, options, questions = output / str(number), run["options"], run["questions"]
        name, argv = RUNNERS.get(run["runner"]), ["--score", "x"]
        if run["runner"] == "model_vqa_loader":
            for split in ("test", "test-dev"):
                write_lines(data / f"llava_vqav2_mscoco_{split}2015.jsonl", questions)
        elif run["runner"] == "model_vqa_amber":
            kinds = [{"type": "generative", "truth": [], "hallu": []}] * max(row["id"] for row in questions)
            write_json(data / "data/query/query_all.json", questions)
            write_json(data / "data/annotations.json", kinds)
            write_json(data / "data/relation.json", {})
            write_lines(data / "data/safe_words.txt", [])
        elif run["runner"] == "model_vqa_mmbench":
            name = "mmbench-cn" if options["lang"] == "cn" else "mmbench"
            file = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench-cn": "mmbench_dev_cn_20231003.tsv"}[name]
            rows = [questions["header"], *questions["rows"]]
            write_lines(data / file, []).write_text("".join("\t".join(row) + "\n" for row in rows))
            argv += ["--all_rounds"] if options["all_rounds"] else []
        else:
            report.skip(f"runner {number}: {run['runner']}", "here questions are read from the official annotation")
            continue
        benchmark = get_benchmark(name).open(data, build_parser(name).parse_args(argv))
        ids = share(benchmark.ids, options["chunk_idx"], options["num_chunks"])
        model = Scripted([call["scripted_reply"] for call in run["calls"]])
        rows = [row for found in benchmark.answers(model, ids, output) for row in found.answers.values()]
        suffix_is_asked = run["runner"] != "model_vqa_mmbench" or options["single_pred_prompt"]
        asked = [text if suffix_is_asked else text.removesuffix(benchmark.entry.suffix) for text in model.asked]
        inside = [
            (text, f"<image>\n{text}" in prompt, True) for text, prompt in zip(asked, run["prompts"], strict=True)
        ]
        report.same(f"runner {number}: prompts of {name}", inside)
        kept = ("question_id", "id", "round_id", "prompt", "text", "response", "options", "option_char")
        pairs = [
            (str(to), {key: row[{"id": "question_id", "response": "text"}.get(key, key)] for key in kept if key in to},
             {key: to[key] for key in kept if key in to})
            for row, to in zip(rows, run["answer_rows"], strict=True)
        ]  # fmt: skip
        report.same(f"runner {number}: answers of {name}", pairs)


DOCUMENTS: dict[str, Callable[[dict, Path, Report], None]] = {
    "chartqa.json": read_chartqa,
    "textvqa.json": read_slime_textvqa,
    "pope.json": read_slime_pope,
    "scienceqa.json": read_slime_scienceqa,
    "mmbench.json": read_slime_mmbench,
    "mme.json": read_mme,
    "amber.json": read_amber,
    "conversions.json": read_conversions,
    "runners.json": read_runners,
}
