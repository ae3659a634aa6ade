"""Texts of documents: ANLS of DocVQA, and the figures of page OCR in the tables of Vary, Fox and GOT."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from mindvlm.core.errors import UserError
from mindvlm.processing.text.edit_distance import normalized_edit_distance

ANLS_THRESHOLD = 0.5
MAX_NGRAM = 4
CHINESE = re.compile("[\u4e00-\u9fa5]")


def anls(text: str, answers: Sequence[str]) -> float:
    """Returns the average normalised Levenshtein similarity of one answer (Biten et al. 2019), 0 to 1.

    As in the program of the challenge, the distance ignores case and the amount of white space, the length by which it
    is divided is that of the longer text in capitals with all white space, and a similarity of exactly one half counts.
    """
    given, similarities = " ".join(text.lower().split()), []
    for answer in answers:
        distance = Levenshtein.distance(given, " ".join(answer.lower().split()))
        length = max(len(text.upper()), len(answer.upper()))
        similarities.append(1 - distance / length if length else 1.0)
    nearest = max(similarities)
    return nearest if nearest >= ANLS_THRESHOLD else 0.0


def page_figures(text: str, truth: str, meteor: Callable[[list[str], list[str]], float] | None) -> dict[str, float]:
    """Returns the figures of a page that was read.

    `edit_distance` counts characters over the longer text. Precision, recall and F1 compare the sets of words, BLEU
    and METEOR their sequences. Chinese is cut into words by jieba.

    Args:
        meteor: called with (true words, read words); None leaves METEOR out.
    """
    has_chinese = CHINESE.search(text) or CHINESE.search(truth)
    read, true = ((chinese_words(one) if has_chinese else one.split()) for one in (text, truth))
    common = len(set(read) & set(true))
    precision = common / len(set(read)) if read else 0.0
    recall = common / len(set(true)) if true else 0.0
    figures = {
        "edit_distance": normalized_edit_distance([text], [truth]),
        "f1": 2 * precision * recall / (precision + recall) if common else 0.0,
        "precision": precision,
        "recall": recall,
        "bleu": bleu(read, true),
    }
    return figures | ({"meteor": meteor(true, read)} if meteor else {})


def chinese_words(text: str) -> list[str]:
    """Returns the words of a Chinese text. Raises UserError if jieba is not installed."""
    try:
        import jieba
    except ImportError:
        raise UserError("Chinese pages need the package jieba; run: pip install jieba") from None
    jieba.setLogLevel("WARNING")
    return jieba.lcut(text)


def bleu(words: Sequence[str], truth: Sequence[str]) -> float:
    """Returns BLEU of one sentence (Papineni et al. 2002) up to four words, without smoothing.

    As in NLTK, an order without any match counts as the smallest float.
    """
    logarithms = []
    for size in range(1, MAX_NGRAM + 1):
        found, true = (
            Counter(tuple(one[at : at + size]) for at in range(len(one) - size + 1)) for one in (words, truth)
        )
        matches = sum((found & true).values())
        if size == 1 and not matches:
            return 0.0
        logarithms.append(math.log(matches / max(1, sum(found.values())) if matches else sys.float_info.min))
    penalty = 1.0 if len(words) > len(truth) else math.exp(1 - len(truth) / len(words))
    return penalty * math.exp(sum(logarithm / MAX_NGRAM for logarithm in logarithms))


@cache
def find_meteor() -> Callable[[list[str], list[str]], float] | None:
    """Returns METEOR of NLTK, None if NLTK or its WordNet is not installed."""
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None
    return single_meteor_score


def meteor_remark() -> str:
    """Returns a line on how to get METEOR; empty if it is computed."""
    if find_meteor():
        return ""
    return (
        "meteor is not computed: it needs NLTK (pip install nltk) and its WordNet (python -m "
        "nltk.downloader wordnet; docs/evaluation.md has a source for machines that reach only PyPI)"
    )


BOX = re.compile(r"\[\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\]")


def first_box(text: str) -> tuple[float, ...] | None:
    """Returns the corners x1, y1, x2, y2 of the first box in an answer, as shares of the picture; None without one.

    Values up to 1 are shares, larger ones thousandths, as Vary writes them.
    """
    found = BOX.search(text)
    if not found:
        return None
    values = [float(value) for value in found.groups()]
    return tuple(value / (1000 if max(values) > 1 else 1) for value in values)


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the overlap of two boxes given by corners, 0 for an empty one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(0.0, width) * max(0.0, height)
    areas: list[Any] = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second)]
    return both / (sum(areas) - both) if both else 0.0
