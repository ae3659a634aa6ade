"""Labels as computed by the LLaVA programs and their descendants.

These split the text of a prompt at the closing marks of answers, tokenize each part and add the lengths. If the sum
differs from the length of the whole prompt, the sample is not learned. `build_sample` instead derives labels from the
pieces of the prompt, with the same result where this method works.
"""

from collections.abc import Callable

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.processing.text.chat_template import ChatTemplate, LabelRule

IGNORED_LABEL = -100


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
    """Returns the labels (length,) of a prompt, and a warning if the counts differ and the sample is not learned.

    Args:
        count: returns the number of tokens of a text with its beginning mark.
        pad_id: id of padding in the program.
        continues_text: see `Tokenizer`.

    Raises:
        UserError: the template has no label rule.
    """
    rule = template.label_rule
    if rule is None or rule.kind != "rounds":
        raise UserError(f"original_parse: template {template.name!r} has no original label rule; use another template")
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
    # questions and answers share one mark: the first round is system message, question and answer, later ones are pairs
    separator = template.separator
    turns = prompt.split(separator)
    return [separator.join(turns[:3])] + [separator.join(turns[i : i + 2]) for i in range(3, len(turns), 2)]


def message_labels(ids: np.ndarray, lengths: list[int], is_question: list[bool]) -> np.ndarray:
    """Returns the labels (length,) of the kind "messages": everything after the header except the questions.

    Args:
        lengths: number of tokens of the header and of every message.
        is_question: whether each message is a question. Its first two tokens, the opening mark, are learned.
    """
    labels = ids.copy()
    position, *lengths = lengths
    labels[:position] = IGNORED_LABEL
    for length, masked in zip(lengths, is_question, strict=True):
        if masked:
            labels[position + 2 : position + length] = IGNORED_LABEL
        position += length
    return labels
