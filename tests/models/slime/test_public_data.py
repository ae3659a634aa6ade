"""The sources of SMR, each from a made download in the published form."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.datagen.public_data import prepare
from mindvlm.models.slime.public_data import DESCRIBE, PUBLIC_DATA, ai2d, arxivqa, mathvision, textbookqa
from mindvlm.processing.samples.public_data import Item, Unusable

IMAGE = "an image"
WORDS = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def lines(*records: dict) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


GEOMETRY = {
    "problem_text": "Find $x$.",
    "choices": ["3.0", "4.0", "5.0", "6.0"],
    "answer": "C",
    "data_type": "train",
    "problem_type_graph": ["Triangle"],
}
GEOQA = {
    "subject": "如图，AB∥CD，∠ABC=50°，则∠BCD等于（）",
    "choices": ["40°", "50°", "60°", "130°"],
    "label": 1,
    "answer": "∵AB∥CD，∴∠BCD=∠ABC=50°．故选B.",
    "formal_point": ["平行线"],
    "id": 7,
}
MATH = {"id": "1", "options": [], "answer": "7", "solution": None, "level": 1, "subject": "counting"}
MATH |= {"question": "How many cubes?\n<image1>", "image": "images/1.jpg"}
DOWNLOADS: dict[str, dict] = {
    "arxivqa": {
        "arxivqa.jsonl": lines(
            {
                "id": "physics-1",
                "image": "images/2211.02201_2.jpg",
                "options": ["A) It rises.", "B) It falls."],
                "question": "What does the curve do?",
                "label": "B",
                "rationale": "The curve goes down.",
            }
        ),
        "images/2211.02201_2.jpg": IMAGE,
    },
    "dvqa": {
        "train_qa.json": [
            {
                "question": "What is the value of the largest bar?",
                "question_id": 17,
                "template_id": "reasoning",
                "answer": 9,
                "answer_bbox": [],
                "image": "bar_train_00000001.png",
            }
        ],
        "images/bar_train_00000001.png": IMAGE,
    },
    "chartqa": {
        "train/train_human.json": [{"imgname": "41.png", "query": "How many bars?", "label": "4"}],
        "train/train_augmented.json": [{"imgname": "41.png", "query": "Which year is first?", "label": "2019"}],
        "train/png/41.png": IMAGE,
    },
    "geometry3k": {
        "train/10/data.json": GEOMETRY,
        "train/10/img_diagram.png": IMAGE,
        "train/9/data.json": GEOMETRY | {"answer": "A"},
        "train/9/img_diagram.png": IMAGE,
    },
    "geoqa3": {"json/7.json": GEOQA, "image/7.png": IMAGE},
    "mathvision": {
        "data/test.jsonl": lines(MATH, MATH | {"id": "4"}),
        "data/testmini.jsonl": lines(MATH | {"id": "4"}),
        "images/1.jpg": IMAGE,
    },
    "scienceqa": {
        "problems.json": {
            "1": {
                "question": "Which of these states is farthest north?",
                "choices": ["West Virginia", "Louisiana"],
                "answer": 0,
                "hint": "",
                "image": "image.png",
                "lecture": "Maps have four directions.",
                "solution": "West Virginia is farthest north.",
                "split": "train",
            },
            "2": {
                "question": "Which word is a noun?",
                "choices": ["run", "tree", "blue"],
                "answer": 1,
                "hint": "Read the words.",
                "image": None,
                "lecture": "",
                "solution": "",
                "split": "train",
            },
            "3": {"split": "test"},
        },
        "train/1/image.png": IMAGE,
    },
    "tabmwp": {
        "problems_train.json": {
            "16": {
                "question": "What is the mean of the numbers?",
                "choices": None,
                "answer": "84",
                "unit": "coins",
                "table_title": "Coin collections",
                "solution": "672 ÷ 8 = 84\nThe mean is 84.",
                "ques_type": "free_text",
                "split": "train",
            }
        },
        "problems_dev.json": {
            "17": {
                "question": "Is there a shortage or a surplus?",
                "choices": ["shortage", "surplus"],
                "answer": "surplus",
                "unit": None,
                "solution": "There is too much.",
                "ques_type": "multi_choice",
                "split": "dev",
            }
        },
        "tables/16.png": IMAGE,
        "tables/17.png": IMAGE,
    },
    "textbookqa": {
        "train/tqa_v1_train.json": [
            {
                "globalID": "L_0001",
                "lessonName": "earth science",
                "questions": {
                    "nonDiagramQuestions": {"NDQ_1": {"beingAsked": {"processedText": "Not taken"}}},
                    "diagramQuestions": {
                        "DQ_1": {
                            "answerChoices": {
                                "b": {"processedText": "mantle", "rawText": "b. mantle"},
                                "a": {"processedText": "crust", "rawText": "a. crust"},
                            },
                            "beingAsked": {"processedText": "Which layer is outside?"},
                            "correctAnswer": {"processedText": "a"},
                            "imagePath": "question_images/earth_1.png",
                        }
                    },
                },
                "instructionalDiagrams": {
                    "DD_1": {
                        "imagePath": "teaching_images/earth_2.png",
                        "processedText": "This diagram shows the layers of the earth.",
                    }
                },
            }
        ],
        "train/question_images/earth_1.png": IMAGE,
        "train/teaching_images/earth_2.png": IMAGE,
    },
    "ai2d": {
        "questions/2.png.json": {
            "imageName": "2.png",
            "questions": {
                "What eats grass?": {
                    "abcLabel": False,
                    "answerTexts": ["cow", "sun"],
                    "correctAnswer": 0,
                    "questionId": "2.png-0",
                },
                "Which label is the sun?": {
                    "abcLabel": True,
                    "answerTexts": ["C", "B"],
                    "correctAnswer": 1,
                    "questionId": "2.png-1",
                },
            },
        },
        "questions/10.png.json": {"imageName": "10.png", "questions": {"Held out?": {"answerTexts": ["a", "b"]}}},
        "ai2d_test_ids.csv": "10\n11\n",
        "images/2.png": IMAGE,
        "abc_images/2.png": IMAGE,
    },
    "geoqa-plus": {
        "geoqa+.jsonl": lines(
            {
                "id": 3,
                "image": "images/12.png",
                "conversations": [
                    {"from": "human", "value": "<image>\n求角度。"},
                    {"from": "gpt", "value": "答案是A"},
                ],
            }
        ),
        "images/12.png": IMAGE,
    },
}
NORTH = "Lecture: Maps have four directions.\nSolution: West Virginia is farthest north.\nThe answer is A."
# id, image, texts
EXPECTED = {
    "arxivqa": [
        (
            "arxivqa-physics-1",
            "arxivqa/images/2211.02201_2.jpg",
            "<image>\nWhat does the curve do?\nOptions: (A) It rises. (B) It falls.",
            "The curve goes down. So the answer is B.",
        )
    ],
    "dvqa": [
        (
            "dvqa-17",
            "DVQA/images/bar_train_00000001.png",
            f"<image>\nWhat is the value of the largest bar?\n{WORDS}",
            "9",
        )
    ],
    "chartqa": [
        ("chartqa-human-0", "ChartQA/train_images/41.png", f"<image>\nHow many bars?\n{WORDS}", "4"),
        ("chartqa-augmented-0", "ChartQA/train_images/41.png", f"<image>\nWhich year is first?\n{WORDS}", "2019"),
    ],
    "geometry3k": [
        (
            f"geometry3k-{number}",
            f"Geometry3K/{number}/img_diagram.png",
            f"<image>\nFind $x$.\nOptions: (A) 3.0 (B) 4.0 (C) 5.0 (D) 6.0\n{LETTER}",
            letter,
        )
        for number, letter in ((9, "A"), (10, "C"))
    ],
    "geoqa3": [
        (
            "geoqa3-7",
            "GeoQA3/image/7.png",
            "<image>\n如图，AB∥CD，∠ABC=50°，则∠BCD等于（）\n选项：(A) 40° (B) 50° (C) 60° (D) 130°",
            "∵AB∥CD，∴∠BCD=∠ABC=50°．故选B.\n所以答案是B。",
        )
    ],
    "mathvision": [("mathvision-1", "mathvision/images/1.jpg", f"<image>\nHow many cubes?\n{WORDS}", "7")],
    "scienceqa": [
        (
            "scienceqa-1",
            "scienceqa/1.jpg",
            "<image>\nContext: N/A\nQuestion: Which of these states is farthest north?\n"
            "Options: (A) West Virginia (B) Louisiana",
            NORTH,
        ),
        (
            "scienceqa-2",
            None,
            "Context: Read the words.\nQuestion: Which word is a noun?\nOptions: (A) run (B) tree (C) blue",
            "The answer is B.",
        ),
    ],
    "tabmwp": [
        (
            "tabmwp-16",
            "tabmwp/16.png",
            "<image>\nWhat is the mean of the numbers? (Unit: coins)",
            "672 ÷ 8 = 84\nThe mean is 84. So the answer is 84.",
        ),
        (
            "tabmwp-17",
            "tabmwp/17.png",
            "<image>\nIs there a shortage or a surplus?\nOptions: (A) shortage (B) surplus",
            "There is too much. So the answer is B.",
        ),
    ],
    "textbookqa": [
        (
            "textbookqa-DQ_1",
            "tqa/train/question_images/earth_1.png",
            f"<image>\nWhich layer is outside?\nOptions: (A) crust (B) mantle\n{LETTER}",
            "A",
        ),
        (
            "textbookqa-DD_1",
            "tqa/train/teaching_images/earth_2.png",
            "<image>\nExplain what the diagram shows.",
            "This diagram shows the layers of the earth.",
        ),
    ],
    "ai2d": [
        ("ai2d-2.png-0", "ai2d/images/2.png", f"<image>\nWhat eats grass?\nOptions: (A) cow (B) sun\n{LETTER}", "A"),
        (
            "ai2d-2.png-1",
            "ai2d/abc_images/2.png",
            f"<image>\nWhich label is the sun?\nOptions: (A) C (B) B\n{LETTER}",
            "B",
        ),
    ],
    "geoqa-plus": [("geoqa-plus-3", "geoqa+/images/12.png", "<image>\n求角度。", "答案是A")],
}


def write_download(folder: Path, name: str) -> Path:
    """Writes the made download of a source."""
    for path, content in DOWNLOADS[name].items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if content == IMAGE:
            Image.new("RGB", (40, 30), (len(path), 90, 200)).save(file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def records(name: str) -> list[dict]:
    return [
        {
            "id": id,
            **({"image": image} if image else {}),
            "conversations": [
                {"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)
            ],
        }
        for id, image, *texts in EXPECTED[name]
    ]


def test_every_source_is_tested():
    assert PUBLIC_DATA.keys() == DOWNLOADS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", PUBLIC_DATA)
def test_records_of_a_source(tmp_path, name):
    made = prepare(PUBLIC_DATA[name], name, write_download(tmp_path / "download", name), tmp_path / "root")
    expected = records(name)
    assert json.loads((tmp_path / "root" / f"{name}.json").read_text(encoding="utf-8")) == expected
    assert (made.num_items, made.num_records, made.skipped) == (len(expected), len(expected), {})
    for record in expected:
        if "image" in record:
            with Image.open(tmp_path / "root" / record["image"]) as image:
                assert image.size == (40, 30)


@pytest.mark.parametrize("name", PUBLIC_DATA)
def test_a_missing_part_is_named_with_its_place(tmp_path, name):

    for path in PUBLIC_DATA[name].needs:
        download = write_download(tmp_path / path.replace("/", "_"), name)
        (download / path).rename(tmp_path / "away")
        with pytest.raises(UserError) as raised:
            prepare(PUBLIC_DATA[name], name, download, tmp_path / "root")
        message = str(raised.value)
        assert message.startswith(f"{download}/") and " not found: " in message and "\n" not in message
        assert PUBLIC_DATA[name].page in message and path.split("/")[0] in message
        (tmp_path / "away").rename(tmp_path / f"away_{path.replace('/', '_')}")
    assert not (tmp_path / "root").exists()


def exchange_of(function, content, seed=0):
    return function(Item("1", content), random.Random(seed)).texts


@pytest.mark.parametrize(
    ("options", "label", "letter"),
    [
        (["A) up", "B) down"], "B", "B"),
        (["A) up", "B) down"], "b)", "B"),
        (["A) up", "B) down"], "(A)", "A"),
        (["A) up", "B) down"], "B) down", "B"),
        (["A) up", "B) down"], "down", "B"),
        (["A) up", "B) down"], "[B]", "B"),
        # a letter is the mark of an option, not the text of another one
        (["A) B", "B) A"], "A", "A"),
        (["A) I. up", "B) II. down"], "I. up", "A"),
        # some lists end with the caption of a figure
        (["A) up", "B) down", "## Figure 2"], "B", "B"),
        (["(a) up", "(b) down"], "A. up and more", "A"),
        # an option that begins with the article is no label
        (["no line", "A line"], "A line", "B"),
        # marks that are not A, B ... are part of the options
        (["B) up", "A) down"], "A) down", "B"),
    ],
)
def test_labels_of_arxivqa(options, label, letter):
    content = {"question": "q", "rationale": "r", "image": "i.jpg", "options": options, "label": label}
    question, answer = exchange_of(arxivqa, content)
    assert answer == f"r So the answer is {letter}."
    assert question.startswith("q\nOptions: (A) ") and " (B) " in question and "##" not in question


@pytest.mark.parametrize("label", ["C", "", None, "sideways", "Both", "1"])
def test_a_label_that_names_no_option_is_refused(label):
    content = {"question": "q", "rationale": "r", "image": "i.jpg", "options": ["A) up", "B) down"], "label": label}
    with pytest.raises(Unusable, match="none of the options|no text under 'label'"):
        exchange_of(arxivqa, content)


def test_questions_of_mathvision():
    letters = {"options": ["A", "B", "C"], "answer": "C", "image": "images/1.jpg"}
    question = "Which is opposite to <image2>?\n<image1> <image3>"
    assert exchange_of(mathvision, letters | {"question": question}) == (
        f"Which is opposite to <image2>?\n{LETTER}",
        "C",
    )
    marked = letters | {"question": "Which one?", "options": ["(A)", "(B)", "(C)"]}
    assert exchange_of(mathvision, marked) == (f"Which one?\n{LETTER}", "C")
    solved = {"options": ["1", "2"], "answer": "B", "solution": "1 + 1 = 2", "image": "images/1.jpg"}
    assert exchange_of(mathvision, solved | {"question": "<image1>\nHow many?"}) == (
        "How many?\nOptions: (A) 1 (B) 2",
        "1 + 1 = 2 So the answer is B.",
    )


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("How many mandarins has Eve got? <image1>", "How many mandarins has Eve got?\n"),
        ("How big is $x?$ <image1> <image2>", "How big is $x?$\n"),
        ("<image1> How many ways are there?", "How many ways are there?\n"),
        ("5 = 25+<image1>", "5 = 25+<image1>\n"),
        ("What is <image1>square?", "What is <image1>square?\n"),
        # the image is the whole question
        ("<image1>", ""),
    ],
)
def test_marks_of_mathvision_stay_within_sentences(question, shown):
    content = {"question": question, "answer": "7", "image": "images/1.jpg"}
    assert exchange_of(mathvision, content) == (f"{shown}{WORDS}", "7")


def test_solutions_of_mathvision_lose_their_images():
    content = {"question": "How many?\n<image1>", "answer": "7", "image": "images/1.jpg"}
    drawing = "![](https://cdn.mathpix.com/cropped/2023_12_27_0f4e-009.jpg?height=212&top_left_x=1529)"
    assert exchange_of(mathvision, content | {"solution": f"It is 3.\n{drawing}\nAnd 4. {drawing}"}) == (
        "How many?",
        "It is 3.\nAnd 4. So the answer is 7.",
    )
    assert exchange_of(mathvision, content | {"solution": drawing}) == (f"How many?\n{WORDS}", "7")


def test_empty_and_repeated_options_of_ai2d_are_left_out():
    content = {"question": "What eats?", "image": "2.png", "answerTexts": ["cow", "{}", "cow", "sun"]}
    question, answer = exchange_of(ai2d, content | {"correctAnswer": 3})
    assert question == f"What eats?\nOptions: (A) cow (B) sun\n{LETTER}" and answer == "B"
    assert exchange_of(ai2d, content | {"correctAnswer": 2})[1] == "A"
    with pytest.raises(Unusable, match="none of the options"):
        exchange_of(ai2d, content | {"correctAnswer": 1})


def test_geometry3k_takes_the_validation_split_if_it_is_there(tmp_path):
    download = write_download(tmp_path / "download", "geometry3k")
    (download / "train" / "10").rename(download / "train" / "2100")
    (download / "train" / "9").rename(tmp_path / "2101")
    (download / "val").mkdir()
    (tmp_path / "2101").rename(download / "val" / "2101")
    prepare(PUBLIC_DATA["geometry3k"], "geometry3k", download, tmp_path / "root")
    made = json.loads((tmp_path / "root" / "geometry3k.json").read_text())
    assert [(record["id"], record["image"]) for record in made] == [
        (f"geometry3k-{number}", f"Geometry3K/{number}/img_diagram.png") for number in (2100, 2101)
    ]
    assert all((tmp_path / "root" / record["image"]).is_file() for record in made)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("ai2d", "ai2d_test_ids.csv", b""),
        ("ai2d", "ai2d_test_ids.csv", b"<html>not found</html>"),
        ("ai2d", "ai2d_test_ids.csv", "10\n11\n".encode("utf-16")),
        ("mathvision", "data/testmini.jsonl", b"\n"),
    ],
)
def test_without_the_items_to_leave_out_nothing_is_prepared(tmp_path, name, file, content):
    download = write_download(tmp_path / "download", name)
    (download / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: .*; download it again"):
        prepare(PUBLIC_DATA[name], name, download, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_hidden_files_are_no_problems(tmp_path):
    """Archives made on macOS hold a binary `._NAME` for each file."""
    download = write_download(tmp_path / "download", "geoqa3")
    (download / "json" / "._7.json").write_bytes(b"\0\5\x16\7\xff")
    assert prepare(PUBLIC_DATA["geoqa3"], "geoqa3", download, tmp_path / "root").num_items == 1


def test_descriptions_are_drawn_from_all_questions():
    content = {"imagePath": "teaching_images/1.png", "processedText": "text"}
    drawn = {exchange_of(textbookqa, content, seed)[0] for seed in range(300)}
    assert drawn == set(DESCRIBE) and len(drawn) == 16


@pytest.mark.parametrize("name", PUBLIC_DATA)
@pytest.mark.parametrize("content", [None, [], "text", 3, {}, {"options": 1, "choices": {}, "answerChoices": 1}])
def test_a_malformed_item_is_unusable(name, content):
    with pytest.raises(Unusable):
        PUBLIC_DATA[name].exchange(Item("1", content), random.Random(0))


@pytest.mark.parametrize("name", PUBLIC_DATA)
@pytest.mark.parametrize("broken", ["{", '"text"', "3", "[[1]]", "1" * 5000])
def test_broken_files_are_named(tmp_path, name, broken):

    download = write_download(tmp_path / "download", name)
    for path, content in DOWNLOADS[name].items():
        if content != IMAGE and not path.endswith(".csv"):
            (download / path).write_text(broken)
    with pytest.raises(UserError) as raised:
        prepare(PUBLIC_DATA[name], name, download, tmp_path / "root")
    assert str(download) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "root").exists()
