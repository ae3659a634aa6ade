"""Which tokens of a conversation are learned, counted as the LLaVA programs and their descendants count them.

They split the prompt's text at the marks that close answers, tokenise each part on its own and add the lengths up.
Where the sum is not that of the whole prompt, the sample is given up. `build_sample` of conversation.py knows from the
pieces of the prompt which tokens are an answer, gives the same labels where this works, and has labels where it fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.processing.text.chat_template import ChatTemplate

IGNORED_LABEL = -100


@dataclass(frozen=True)
class LabelRule:
    """How one program counts the rounds of a prompt.

    Attributes:
        header: what stands between question and answer; a round without exactly one of it ends the counting.
        start: tokens before the first round (the beginning mark).
        closing: tokens of the mark that closes a round: a number, or "counted" as the mark's own text.
        shared: tokens at the end of the header that are part of the answer, and beginning marks counted twice.
        counts_ends: end marks are padding for the program, and counted apart.
        continues: later rounds are one token shorter where the tokenizer goes on behind a control token.
    """

    header: str
    start: int = 0
    closing: int | Literal["counted"] = 0
    shared: int = 0
    counts_ends: bool = False
    continues: bool = False


_COLON_HEADER = "{separator}{answerer}: "

LABEL_RULES: dict[str, LabelRule] = {
    "phi": LabelRule(_COLON_HEADER, closing=1, shared=1, counts_ends=True),
    "stablelm": LabelRule(_COLON_HEADER, closing=1, shared=1),
    "v1": LabelRule(_COLON_HEADER, start=1, shared=2, continues=True),
    "llama_2": LabelRule("[/INST] ", start=1, shared=2),
    "tiny_llama": LabelRule("<|assistant|>\n", start=1, shared=1),
    "mpt": LabelRule("{separator}{answerer}", closing="counted"),
}
"""By `ChatTemplate.label_rule`. "default" and "plain" count messages instead, see `message_labels`."""


def round_labels(
    prompt: str,
    ids: np.ndarray,
    *,
    template: ChatTemplate,
    count: Callable[[str], int],
    pad_id: int,
    max_length: int,
    continues_text: bool = False,
) -> tuple[np.ndarray, str]:
    """Labels (length,) of the ids of a prompt, and a warning if the counts disagree and nothing is learned.

    Args:
        count: tokens of a text on its own, beginning mark and all.
        pad_id: id that the program takes for padding.
        continues_text: of the tokenizer.

    Raises:
        UserError: the template has no such rule.
    """
    if template.label_rule not in LABEL_RULES:
        raise UserError(f"original_parse: template {template.name!r} has no original label rule; use another template")
    rule = LABEL_RULES[template.label_rule]
    header = rule.header.format(separator=template.separator, answerer=template.roles[1])
    labels = ids.copy()
    labels[: rule.start] = IGNORED_LABEL
    position = rule.start
    for number, text in enumerate(_rounds(prompt, template, rule)):
        if text == "" and rule.closing != "counted":
            break
        question, *answers = text.split(header)
        if len(answers) != 1:
            break
        shorter = int(rule.continues and continues_text and number > 0)
        num_masked = max(0, count(question + header) - rule.shared - shorter)
        labels[position : position + num_masked] = IGNORED_LABEL
        closing = count(template.separator) if rule.closing == "counted" else rule.closing
        position += count(text) - shorter + closing
    labels[position:] = IGNORED_LABEL
    total = int((ids != pad_id).sum())
    if rule.counts_ends:
        total += prompt.count(template.answer_separator)
    if position >= max_length or position == total:
        return labels, ""
    labels[:] = IGNORED_LABEL
    return labels, f"WARNING: tokenization mismatch: {position} vs. {total}. (ignored)"


def _rounds(prompt: str, template: ChatTemplate, rule: LabelRule) -> list[str]:
    if rule.closing != "counted":
        return prompt.split(template.answer_separator)
    # questions and answers have the same mark: the system message, a question and an answer, then two by two
    separator = template.separator
    turns = prompt.split(separator)
    return [separator.join(turns[:3])] + [separator.join(turns[i : i + 2]) for i in range(3, len(turns), 2)]


def message_labels(ids: np.ndarray, lengths: list[int], is_question: list[bool]) -> np.ndarray:
    """Labels (length,) of the rule "default": everything behind the header but the questions.

    Args:
        lengths: tokens of the header and of every message.
        is_question: of every message. The first two tokens of a question (its opening mark) are learned.
    """
    labels = ids.copy()
    position, *lengths = lengths
    labels[:position] = IGNORED_LABEL
    for length, masked in zip(lengths, is_question, strict=True):
        if masked:
            labels[position + 2 : position + length] = IGNORED_LABEL
        position += length
    return labels
