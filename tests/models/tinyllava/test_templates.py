import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.templates import TEMPLATES, image_turns
from mindvlm.processing.text.chat_template import get_template, prompt_text, render

TURNS = ["Q", "A", "R", None]
SYSTEM_A = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def text_of(name, turns=TURNS) -> str:
    return prompt_text(render(get_template(name, TEMPLATES), turns))


def test_the_names_of_the_original_and_two_that_it_lost():
    names = "default v0 v1 vicuna_v1 llama_2 plain v0_plain llava_v0 v0_mmtag llava_v1 v1_mmtag llava_llama_2 mpt"
    names += " tiny_llama phi mistral_instruct chatml_direct mistral_direct stablelm llava_hf qwen2"
    assert list(TEMPLATES) == names.split()


def test_the_templates_of_the_zoo():
    assert text_of("phi") == f"{SYSTEM_A} USER: Q ASSISTANT: A<|endoftext|>USER: R ASSISTANT:"
    assert text_of("v1") == f"{SYSTEM_A} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:"
    assert text_of("plain", ["Q", None]) == "Q\n"


def test_the_other_styles():
    assert text_of("mistral_instruct") == "[INST] Q [/INST] A </s>[INST] R [/INST]"
    head, tail = text_of("llava_llama_2").split("\n<</SYS>>\n\n")
    assert head.startswith("[INST] <<SYS>>\nYou are a helpful") and tail == "Q [/INST] A </s><s>[INST] R [/INST]"
    assert text_of("tiny_llama").endswith("\n<|user|>\nQ\n<|assistant|>\nA</s><s><|user|>\nR\n<|assistant|>\n")
    assert text_of("llava_v0").endswith("questions.###Human: Q###Assistant: A###Human: R###Assistant:")
    assert text_of("chatml_direct") == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA"
        "<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n"
    )


def test_the_first_model_is_asked_in_its_own_way():
    assert text_of("llava_hf") == "USER: Q\nASSISTANT: A</s>USER: R\nASSISTANT:"


def test_an_example_goes_before_the_first_turn():
    text = text_of("v0")
    assert text.index("renewable") < text.index("Human: Q###") and text.count("###Human: ") == 3


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain", "v0_plain"}))
def test_only_answers_and_their_ends_are_learned(name):
    template = TEMPLATES[name]
    learned = "".join(piece.text for piece in render(template, ["Q", "A", "R", "B"])[-40:] if piece.learned)
    space = " " if template.style in ("colon_pair", "colon_single", "instruction") else ""
    closing = template.answer_joint + template.answer_separator
    assert learned.endswith(f"{space}A{closing}{space}B{closing}")
    assert template.examples or learned == f"{space}A{closing}{space}B{closing}"


@pytest.mark.parametrize(("name", "turns"), [("llama_2", [None]), ("tiny_llama", ["", "A"]), ("plain", ["Q", "A"])])
def test_turns_that_a_style_cannot_write(name, turns):
    with pytest.raises(UserError, match=f"chat template '{name}'"):
        text_of(name, turns)


TAGGED = "<Image><image></Image>"


@pytest.mark.parametrize(
    ("question", "turns"),
    [
        ("What?", ["What?"]),
        ("<image>What?", [TAGGED, "Received.", "What?"]),
        ("What?\n<image>", [TAGGED, "Received.", "What?"]),
        ("<image>\n<image>\nWhat?", [TAGGED + TAGGED, "Received.", "What?"]),
        ("<image>", [TAGGED, "Received.", ""]),
        ("<image> and <image>: what?", [f"{TAGGED} and {TAGGED}: what?"]),
    ],
)
def test_a_template_that_announces_pictures_shows_them_first(question, turns):
    assert image_turns(TEMPLATES["v0_mmtag"], question) == turns
    assert image_turns(TEMPLATES["phi"], question) == [question]


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(UserError, match="'llama2' is unknown; known are .*llama_2.*phi.*v1"):
        get_template("llama2", TEMPLATES)
