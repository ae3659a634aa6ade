"""The chat templates of TinyLLaVA, under the names of the original program.

Label rules follow the intent of the original: its tag `llama_v2` matches no rule and falls back to another one, and its
`stablelm` and `qwen2` templates are in no table. Here they have their rules and names. `llava_hf` is the prompt format
of the first TinyLLaVA's model page; no program trains with it.
"""

from mindvlm.processing.images.image_span import IMAGE_MARKER, with_image_marks
from mindvlm.processing.text.chat_template import CHATML, ChatTemplate, LabelRule

_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN = _USER.replace("user", "human")
_TAGGED_IMAGES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language."
)
_SAFETY = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_ENERGY_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)

_COLON_HEADER = "{separator}{answerer}: "

LABEL_RULES: dict[str, LabelRule] = {
    "phi": LabelRule(header=_COLON_HEADER, closing=1, shared=1, counts_ends=True),
    "stablelm": LabelRule(header=_COLON_HEADER, closing=1, shared=1),
    "v1": LabelRule(header=_COLON_HEADER, start=1, shared=2, continues=True),
    "llama_2": LabelRule(header="[/INST] ", start=1, shared=2),
    "tiny_llama": LabelRule(header="<|assistant|>\n", start=1, shared=1),
    "mpt": CHATML["label_rule"],
    "default": LabelRule("messages"),
    "plain": LabelRule("picture"),
}
"""The label rules, under the names of the original's maskers."""

_PAIR = {"style": "colon_pair", "roles": ("USER", "ASSISTANT"), "separator": " ", "answer_separator": "</s>"}
_END_OF_TEXT_PAIR = {**_PAIR, "answer_separator": "<|endoftext|>"}
_SINGLE = {
    "style": "colon_single",
    "roles": ("Human", "Assistant"),
    "separator": "###",
    "answer_separator": "###",
    "label_rule": LABEL_RULES["default"],
}
_INSTRUCTION = {
    "style": "instruction",
    "roles": ("USER", "ASSISTANT"),
    "question_marks": ("[INST] ", " [/INST]"),
    "answer_mark": " ",
    "separator": "<s>",
    "answer_separator": "</s>",
    "answer_joint": " ",
    "system_prefix": "<<SYS>>\n",
    "system_joint": "\n<</SYS>>\n\n",
    "label_rule": LABEL_RULES["llama_2"],
}
_TAGGED = {
    "style": "tagged",
    "roles": ("USER", "ASSISTANT"),
    "question_marks": ("<|user|>\n", "\n"),
    "answer_mark": "<|assistant|>\n",
    "separator": "<s>",
    "answer_separator": "</s>",
    # the original strips every leading character of "<s>" from the prompt, so also the first one of "<|system|>"
    "system_prefix": "|system|>\n",
    "system_joint": "\n",
    "label_rule": LABEL_RULES["tiny_llama"],
}
_PLAIN = {
    "style": "plain",
    "system": "",
    "roles": ("", ""),
    "separator": "\n",
    "answer_separator": "\n",
    "label_rule": LABEL_RULES["plain"],
}
_CHATML_ANSWERER = {**CHATML, "system": "Answer the questions."}
_IM_TURNS = {**CHATML, "roles": ("<im_start>user\n", "<im_start>assistant\n")}
_IM_TURNS |= {"separator": "<im_end>", "answer_separator": "<im_end>"}

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("default", system=_HUMAN, examples=_ENERGY_EXAMPLE, **_SINGLE),
        ChatTemplate("v0", system=_HUMAN, examples=_ENERGY_EXAMPLE, **_SINGLE),
        ChatTemplate("v1", system=_USER, label_rule=LABEL_RULES["v1"], **_PAIR),
        ChatTemplate("vicuna_v1", system=_USER, label_rule=LABEL_RULES["v1"], **_PAIR),
        ChatTemplate("llama_2", system=_SAFETY, **_INSTRUCTION),
        ChatTemplate("plain", **_PLAIN),
        ChatTemplate("v0_plain", **_PLAIN),
        ChatTemplate("llava_v0", system=_HUMAN, **_SINGLE),
        ChatTemplate("v0_mmtag", system=_TAGGED_IMAGES, **_SINGLE),
        ChatTemplate("llava_v1", system=_HUMAN, label_rule=LABEL_RULES["v1"], **_PAIR),
        ChatTemplate("v1_mmtag", system=_TAGGED_IMAGES, label_rule=LABEL_RULES["default"], **_PAIR),
        ChatTemplate("llava_llama_2", system=_VISION, **_INSTRUCTION),
        ChatTemplate(
            "mpt",
            system="A conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers.",
            **CHATML,
        ),
        ChatTemplate("tiny_llama", system=_VISION, **_TAGGED),
        ChatTemplate("phi", system=_USER, label_rule=LABEL_RULES["phi"], **_END_OF_TEXT_PAIR),
        ChatTemplate("mistral_instruct", system="", **{**_INSTRUCTION, "separator": ""}),
        ChatTemplate("chatml_direct", **_CHATML_ANSWERER),
        ChatTemplate("mistral_direct", **_CHATML_ANSWERER),
        ChatTemplate("stablelm", system=_USER, label_rule=LABEL_RULES["stablelm"], **_END_OF_TEXT_PAIR),
        ChatTemplate(
            "llava_hf",
            style="instruction",
            system="",
            roles=("USER", "ASSISTANT"),
            question_marks=("USER: ", "\nASSISTANT:"),
            answer_mark=" ",
            separator="",
            answer_separator="</s>",
        ),
        ChatTemplate("qwen2", system="You are a helpful assistant", **_IM_TURNS),
    )
}

TAGGED_IMAGE = ("<Image>", "</Image>")
"""The tags around an image in the templates that announce them."""


def announces_images(template: ChatTemplate) -> bool:
    """Returns whether the system message of the template announces tags around images."""
    return template.name.endswith("_mmtag")


def image_turns(template: ChatTemplate, question: str) -> list[str]:
    """Returns the turns of a question, starting with the user's.

    If the template announces tags, images before or after the question get a separate exchange; images within it stay
    in place, with tags around them.
    """
    num_images = question.count(IMAGE_MARKER)
    if not num_images or not announces_images(template):
        return [question]
    texts = [text.strip() for text in question.split(IMAGE_MARKER) if text.strip()]
    if len(texts) > 1:
        return [with_image_marks(question, TAGGED_IMAGE)]
    return [with_image_marks(IMAGE_MARKER * num_images, TAGGED_IMAGE), "Received.", "".join(texts)]
