"""Boolean checks: whether production code ends a text at some id, and whether it raises a UserError."""

from collections.abc import Callable

from mindvlm.core.errors import UserError
from mindvlm.generation.answer import AnswerText
from mindvlm.processing.text.tokenizer import Tokenizer


def ends_there(tokenizer: Tokenizer, keyword: str, ids: list[int]) -> bool:
    """Returns whether generation ends at the last of these ids, and not before."""
    is_token = keyword in tokenizer.special_ids
    stop_ids = [tokenizer.special_ids[keyword]] if is_token else []
    stop = AnswerText(stop_ids, [] if is_token else [keyword], tokenizer.text_decoder())
    for number, token_id in enumerate(ids):
        if stop.reason_after(token_id):
            return number == len(ids) - 1
    return False


def is_refused(call: Callable) -> bool:
    try:
        call()
    except UserError:
        return True
    return False
