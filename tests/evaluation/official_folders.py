"""Folders with three questions of each benchmark, in the official formats, as docs/evaluation.md describes them."""

import base64
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def encoded_picture(number: int = 0, form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 16), (40 * number, 200, 90)).save(content, form)
    return content.getvalue()


class Folder:
    """A folder that is being written."""

    def __init__(self, root: Path):
        self.root = root

    def text(self, name: str, content: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(content, encoding="utf-8")

    def json(self, name: str, value: object) -> None:
        self.text(name, json.dumps(value))

    def lines(self, name: str, rows: list) -> None:
        self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def pictures(self, *names: str) -> None:
        for number, name in enumerate(names):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(encoded_picture(number, "PNG" if name.endswith("png") else "JPEG"))


SHORT = "\nAnswer the question using a single word or phrase."


def vqav2(folder: Folder) -> None:
    rows = [
        {"question_id": 10 + n, "image": f"{n}.jpg", "text": f"What {n}?{SHORT}", "category": "x"} for n in range(4)
    ]
    folder.lines("llava_vqav2_mscoco_test-dev2015.jsonl", rows[:3])
    folder.lines("llava_vqav2_mscoco_test2015.jsonl", rows)
    folder.pictures(*(f"test2015/{n}.jpg" for n in range(3)))


def gqa(folder: Folder) -> None:
    rows = {
        f"20{n}": {
            "question": f"Is it {n}?", "imageId": f"n{n}", "answer": answer, "isBalanced": True,
            "types": {"structural": kind},
        }
        for n, (answer, kind) in enumerate([("yes", "verify"), ("no", "logical"), ("red", "query")])
    }  # fmt: skip
    rows["unbalanced"] = {**rows["200"], "isBalanced": False}
    folder.json("questions1.2/testdev_balanced_questions.json", rows)
    folder.pictures(*(f"images/n{n}.jpg" for n in range(3)))


def textvqa(folder: Folder) -> None:
    # two questions about one picture
    names = ["a", "a", "b"]
    data = [
        {"image_id": name, "question": f"What is Number {n}?", "answers": ["Stop"] * 4 + ["go"] * 6, "question_id": n}
        for n, name in enumerate(names)
    ]
    folder.json("TextVQA_0.5.1_val.json", {"data": data})
    rows = [
        {"question_id": name, "image": f"{name}.jpg", "text": f"What is number {n}?\nReference OCR token: STOP{SHORT}"}
        for n, name in enumerate(names)
    ]
    folder.lines("llava_textvqa_val_v051_ocr.jsonl", rows)
    folder.pictures("train_images/a.jpg", "train_images/b.jpg")


def vizwiz(folder: Folder) -> None:
    rows = [{"question_id": n, "image": f"v{n}.jpg", "text": f"What {n}?{SHORT}"} for n in range(3)]
    folder.lines("llava_test.jsonl", rows)
    folder.pictures(*(f"test/v{n}.jpg" for n in range(3)))


def chartqa(folder: Folder) -> None:
    human = [
        {"imgname": f"{n}.png", "query": f"How much {n}?", "label": label} for n, label in enumerate(["100", "Red"])
    ]
    folder.json("test/test_human.json", human)
    folder.json("test/test_augmented.json", [{"imgname": "0.png", "query": "How many?", "label": "7"}])
    folder.pictures("test/png/0.png", "test/png/1.png")


def docvqa(folder: Folder) -> None:
    rows = [
        {"questionId": 100 + n, "question": f"Name {n}?", "image": f"documents/d{n}.png", "answers": ["Ann Lee", "lee"]}
        for n in range(3)
    ]
    folder.json("val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": rows})
    folder.json("test_v1.0.json", {"data": [{key: row[key] for key in row if key != "answers"} for row in rows]})
    folder.pictures(*(f"spdocvqa_images/d{n}.png" for n in range(3)))


def pope(folder: Folder) -> None:
    rows, labels = [], ["yes", "no", "no"]
    for n, category in enumerate(("adversarial", "popular", "random")):
        rows.append({"question_id": n, "image": f"{n}.jpg", "text": f"Is there {n}?{SHORT}", "category": category})
        label = {"question_id": 1, "image": f"{n}.jpg", "text": f"Is there {n}?", "label": labels[n]}
        folder.lines(f"coco/coco_pope_{category}.json", [label])
    folder.lines("llava_pope_test.jsonl", rows)
    folder.pictures(*(f"val2014/{n}.jpg" for n in range(3)))


def mme(folder: Folder) -> None:
    root = "MME_Benchmark_release_version"
    pair = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    folder.text(f"{root}/color/0001.txt", pair)
    folder.text(f"{root}/OCR/questions_answers_YN/0002.txt", pair.splitlines()[0])
    folder.pictures(f"{root}/color/0001.jpg", f"{root}/OCR/images/0002.png")


def amber(folder: Folder) -> None:
    queries = ["Describe this image.", "Is there a dog in this image?", "Is the sky blue in this image?"]
    rows = [{"id": n, "image": f"AMBER_{n}.jpg", "query": query} for n, query in enumerate(queries, 1)]
    folder.json("data/query/query_all.json", rows)
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    ]
    folder.json("data/annotations.json", annotations)
    folder.json("data/relation.json", {"sky": ["heaven"], "dog": []})
    folder.text("data/safe_words.txt", "light\n")
    folder.pictures(*(f"image/AMBER_{n}.jpg" for n in (1, 2, 3)))


def scienceqa(folder: Folder) -> None:
    common = {"choices": ["one", "two"], "hint": "A  hint.", "answer": 1}
    problems = {str(n): {"question": f"Which {n}?", "image": "image.png" if n else None, **common} for n in range(3)}
    folder.json("problems.json", problems)
    folder.json("pid_splits.json", {"test": ["0", "1", "2"], "val": []})
    folder.pictures("images/test/1/image.png", "images/test/2/image.png")


def mmbench(folder: Folder, name: str = "mmbench_dev_20230712.tsv") -> None:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    picture = base64.b64encode(encoded_picture(1, "JPEG")).decode()
    rows = [[str(n), f"Which {n}?", "" if n else "A hint.", "left", "right", "", "", "A", "c", picture, "dev"]
            for n in range(3)]  # fmt: skip
    folder.text(name, "".join("\t".join(row) + "\n" for row in [columns, *rows]))


def seed(folder: Folder) -> None:
    kinds = [("5", 1, "image"), ("7", 2, "image"), ("v1_9", 2, "video")]
    questions = [
        {"question_id": key, "question_type_id": kind, "data_type": data, "answer": "B", "question": "Which?"}
        for key, kind, data in kinds
    ]
    folder.json("SEED-Bench.json", {"question_type": {"Scene": 1, "Identity": 2}, "questions": questions})
    names = ["SEED-Bench-image/5", "SEED-Bench-image/7", "SEED-Bench-video-image/v1_9.png"]
    ids = [5, 7, "v1_9"]
    rows = [
        {"question_id": key, "image": name, "text": "Which?\nA. a\nB. b"} for key, name in zip(ids, names, strict=True)
    ]
    folder.lines("llava-seed-bench.jsonl", rows)
    folder.pictures(*names)


def mmmu(folder: Folder) -> None:
    import pyarrow
    from pyarrow import parquet

    picture = {"bytes": encoded_picture(), "path": "x.png"}
    rows = [
        ("validation_Art_1", "What <image 1>?", "['red cat', 'dog']", "B", "multiple-choice"),
        ("validation_Art_2", "How many <image 1>?", "[]", "['3', 'three']", "open"),
    ]
    math = [("validation_Math_1", "Sum of <image 1>?", "['1', '2']", "A", "multiple-choice")]
    for subject, group in (("Art", rows), ("Math", math)):
        keys = ("id", "question", "options", "answer", "question_type")
        table = [{**dict(zip(keys, row, strict=True)), "image_1": picture, "image_2": None} for row in group]
        (folder.root / subject).mkdir(parents=True)
        path = folder.root / subject / "validation-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(table), path)


def mathvista(folder: Folder) -> None:
    kinds = [("multi_choice", "text", ["Yes", "No"], None, "No"), ("free_form", "integer", None, None, "3"),
             ("free_form", "float", None, 1.0, "1.2")]  # fmt: skip
    metadata = dict.fromkeys(("language", "category", "task", "context", "grade"), "x") | {"skills": ["counting"]}
    rows = {
        str(n): {
            "question": "?", "image": f"images/{n}.jpg", "choices": choices, "precision": precision, "answer": answer,
            "question_type": kind, "answer_type": answer_type, "pid": str(n), "metadata": metadata,
        }
        for n, (kind, answer_type, choices, precision, answer) in enumerate(kinds, 1)
    }  # fmt: skip
    folder.json("data/testmini.json", rows)
    folder.json("data/query.json", {key: f"Hint: x\nQuestion: {key}?" for key in rows})
    folder.text("evaluation/prompts/ext_ans.py", '# pids\ndemo_prompt = """\nExtract the answer.\n"""\n')
    folder.pictures(*(f"data/images/{n}.jpg" for n in (1, 2, 3)))


def mathverse(folder: Folder) -> None:
    rows = [
        {
            "sample_index": str(n), "problem_version": version, "question": f"Find {n}.", "image": f"v/{n}.png",
            "answer": "4", "metadata": {"subject": "Plane Geometry", "subfield": "Length"}, "query_cot": f"Think. {n}",
        }
        for n, version in enumerate(("Text Dominant", "Vision Only", "Vision Only"), 1)
    ]  # fmt: skip
    folder.json("testmini.json", rows)
    folder.text(
        "evaluation/prompts.py",
        'demo_prompt_extract = """\nExtract.\n"""\ndemo_prompt_score = """\nCompare {question} {gt} {extraction}"""\n',
    )
    folder.pictures(*(f"images/v/{n}.png" for n in (1, 2, 3)))


def mathvision(folder: Folder) -> None:
    rows = [
        {"id": str(n), "question": "Which?\n<image1>", "options": options, "answer": answer, "level": n,
         "subject": "arithmetic", "image": f"images/{n}.jpg"}
        for n, (options, answer) in enumerate([([], "60"), (list("ABCDE"), "A"), (["1", "2", "3", "4", "5"], "B")], 1)
    ]  # fmt: skip
    folder.lines("data/test.jsonl", rows)
    folder.pictures(*(f"images/{n}.jpg" for n in (1, 2, 3)))


def llava_bench_wild(folder: Folder) -> None:
    kinds = ("conv", "detail", "complex")
    rows = [{"question_id": n, "image": "1.jpg", "category": kind, "text": f"Why {n}?"} for n, kind in enumerate(kinds)]
    folder.lines("questions.jsonl", rows)
    folder.lines("answers_gpt4.jsonl", [{"question_id": n, "text": f"Because {n}."} for n in range(3)])
    folder.lines("context.jsonl", [{"image": "1.jpg", "caption": ["A cat.", "A mat."]}])
    folder.json("rule.json", {f"llava_bench_{kind}": {"role": "Assistant", "prompt": "Grade."} for kind in kinds})
    folder.pictures("images/1.jpg")


def mm_vet(folder: Folder) -> None:
    folder.json("mm-vet.json", {f"v1_{n}": {"imagename": f"v1_{n}.png", "question": f"What {n}?"} for n in range(3)})
    folder.pictures(*(f"images/v1_{n}.png" for n in range(3)))


def mmhal(folder: Folder) -> None:
    rows = [
        {"question_type": kind, "image_src": f"https://host/{n}.jpg", "image_content": ["Cat", "Mat"],
         "question": f"What {n}?", "gt_answer": "A cat.", "model_answer": ""}
        for n, kind in enumerate(("attribute", "counting", "counting"))
    ]  # fmt: skip
    folder.json("response_template.json", rows)
    folder.text("eval_gpt4.py", "import openai\ntemplate = '''Contents {}, question {}, standard {}, answer {}'''\n")
    folder.pictures(*(f"images/{n}.jpg" for n in range(3)))


def page_ocr(folder: Folder) -> None:
    rows = [
        {"image": f"en_{n}.png", "conversations": [{"from": "human", "value": "OCR"}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(("the cat sat on the mat", "one two three four five", "x y z w"))
    ]
    folder.json("en_page_ocr.json", rows)
    folder.pictures(*(f"en_pdf_png/en_{n}.png" for n in range(3)))


def refer(name: str, by: str) -> Callable[[Folder], None]:
    def build(folder: Folder) -> None:
        references = [
            {"image_id": 1, "ann_id": n, "split": "val", "sentences": [{"sent": f"the cat {n}", "sent_id": n}]}
            for n in range(3)
        ]
        references.append({**references[0], "split": "train"})
        instances = {
            "annotations": [{"id": n, "bbox": [100 * n, 0, 100, 200]} for n in range(3)],
            "images": [{"id": 1, "file_name": "1.jpg", "width": 400, "height": 400}],
        }
        folder.json(f"{name}/instances.json", instances)
        (folder.root / name / f"refs({by}).p").write_bytes(pickle.dumps(references, protocol=2))
        folder.pictures("images/mscoco/images/train2014/1.jpg")

    return build


def scenes(folder: Folder) -> None:
    """The built-in benchmark, as `mindvlm-make-data benchmark` writes it."""
    rows = [("Is it red?", "yes", "colour"), ("Is it blue?", "no", "colour"), ("How many?", "2", "counting")]
    lines = [
        {"question_id": n, "image": f"{n}.png", "text": text, "answer": answer, "type": kind, "template": text[:2]}
        for n, (text, answer, kind) in enumerate(rows)
    ]
    folder.lines("questions.jsonl", lines)
    folder.pictures(*(f"images/{n}.png" for n in range(3)), "gray.png")


FOLDERS: dict[str, Callable[[Folder], None]] = {
    "vqav2": vqav2, "gqa": gqa, "textvqa": textvqa, "vizwiz": vizwiz, "chartqa": chartqa, "docvqa": docvqa,
    "pope": pope, "mme": mme, "amber": amber, "scienceqa": scienceqa, "mmbench": mmbench,
    "mmbench-cn": lambda folder: mmbench(folder, "mmbench_dev_cn_20231003.tsv"), "seed": seed, "mmmu": mmmu,
    "mathvista": mathvista, "mathverse": mathverse, "mathvision": mathvision, "llava-bench-wild": llava_bench_wild,
    "mm-vet": mm_vet, "mmhal": mmhal, "page-ocr": page_ocr, "refcoco": refer("refcoco", "unc"),
    "refcoco+": refer("refcoco+", "unc"), "refcocog": refer("refcocog", "umd"),
    "scenes": scenes,
}  # fmt: skip


def write_folder(name: str, root: Path) -> Path:
    """Writes the folder of a benchmark and returns its path."""
    root.mkdir(parents=True, exist_ok=True)
    FOLDERS[name](Folder(root))
    return root
