"""The chat templates of SliME, and the training samples of its `llama3`, under the names of the original program."""

from dataclasses import replace
from typing import Any

import numpy as np

from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import TrainingSample, read_record
from mindvlm.processing.samples.label_rules import round_labels
from mindvlm.processing.samples.llava_samples import image_to_front
from mindvlm.processing.text.chat_template import ChatTemplate, LabelRule, prompt_text, render
from mindvlm.processing.text.tokenizer import Tokenizer

TEXT_START, TURN_END, TEXT_END = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
ROUND_END = "<|eot_conversation|>"
"""The mark at which the original program splits a prompt into rounds. It is removed before the text is tokenized."""

_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_PAIR = {
    "style": "colon_pair",
    "roles": ("USER", "ASSISTANT"),
    "separator": " ",
    "answer_separator": "</s>",
    "label_rule": LabelRule(header="{separator}{answerer}: ", start=1, shared=2, continues=True),
}

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("v1", system=_USER, **_PAIR),
        ChatTemplate("vicuna_v1", system=_USER, **_PAIR),
        ChatTemplate("llava_v1", system=_USER.replace("user", "human"), **_PAIR),
        ChatTemplate(
            "llama3",
            style="chatml",
            system="",
            roles=(
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            separator=TURN_END,
            answer_separator=TURN_END,
            label_rule=LabelRule(header="{answerer}", continues=True),
        ),
        ChatTemplate(
            "plain",
            style="plain",
            system="",
            roles=("", ""),
            separator="\n",
            answer_separator="\n",
            label_rule=LabelRule("picture"),
        ),
    )
}


def llama3_prompt(template: ChatTemplate, turns: list[str | None]) -> str:
    """Returns the prompt with `ROUND_END` after every answer."""
    return prompt_text(render(replace(template, answer_separator=TURN_END + ROUND_END), turns))


def llama3_sample(
    record: dict[str, Any], *, tokenizer: Tokenizer, template: ChatTemplate, max_length: int
) -> TrainingSample:
    """Returns the ids and labels of a record for `llama3`; see `llava_sample`.

    Raises:
        UserError: the record is malformed.
    """
    has_image = bool(record.get("image"))
    armed = set(tokenizer.special_ids) - (set() if has_image else {IMAGE_MARKER})

    def encode(text: str) -> list[int]:
        return tokenizer.prefix_ids + tokenizer.encode(text, allow_special=armed)

    _, turns, images = read_record(record)
    prompt = llama3_prompt(template, [image_to_front(turn) for turn in turns] if has_image else list(turns))
    ids = np.array(encode(prompt.replace(ROUND_END, "")), dtype=np.int32)
    ids = ids if has_image else ids[:max_length]
    labels, warning = round_labels(
        prompt,
        ids,
        template=replace(template, answer_separator=ROUND_END),
        count=lambda text: len(encode(text)),
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        # every round is tokenized with a beginning mark, whatever the tokenizer
        continues_text=True,
    )
    return TrainingSample(ids, labels, images, warning)
