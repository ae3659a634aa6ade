"""SliME's router: chooses local feature rows by their similarity to the text of the prompt. It has no parameters.

R local rows, L tokens of text or of a sequence, B sequences, P pictures of a sequence.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindvlm.models.slime.model_config import RouterConfig

# least norm of a vector in a cosine
NORM_EPS = 1e-8
# score of rows that are not among those of a picture
LOWEST = -3.0e38


def text_direction(embeds, mask):
    """Returns the sum of the normalized embeddings of the text, (..., hidden) float32.

    Args:
        embeds: (..., L, hidden).
        mask: (..., L) float32, 0 for padding.
    """
    summed = ops.matmul(mask.expand_dims(-2), normalized(embeds))
    return summed.reshape(embeds.shape[:-2] + embeds.shape[-1:])


def router_scores(rows, direction):
    """Returns the sum over the tokens of text of the cosine with each row, (..., R) float32.

    The cosines are summed before the product: it is linear in the normalized text.

    Args:
        rows: (..., R, hidden).
        direction: (..., hidden) float32, see `text_direction`.
    """
    return ops.matmul(normalized(rows), direction.expand_dims(-1)).reshape(rows.shape[:-1])


def normalized(x):
    """Returns the rows of x (..., hidden) with norm 1, in float32; zero rows stay zero."""
    x = x.astype(ms.float32)
    norm = ops.sqrt((x * x).sum(-1, keepdims=True))
    return x / ops.maximum(norm, ms.Tensor(NORM_EPS, ms.float32))


def scores_on_host(rows: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns `router_scores` of rows (R, hidden) for the embeddings of a text (L, hidden), computed in NumPy.

    Outside of graphs on a CPU, operators keep memory, and a graph would be compiled for each number of rows.

    Returns:
        (R,) float32.
    """
    return normalized_on_host(rows) @ normalized_on_host(text).sum(0)


def normalized_on_host(x: np.ndarray) -> np.ndarray:
    """Returns `normalized` of x (R, hidden)."""
    x = x.astype(np.float32, copy=False)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(NORM_EPS))


def probabilities(scores: np.ndarray, config: RouterConfig) -> np.ndarray:
    """Returns the softmax of scores (R,) over the temperature, float32."""
    scaled = scores.astype(np.float32) / np.float32(config.temperature)
    likelihoods = np.exp(scaled - scaled.max(initial=-np.inf))
    return likelihoods / likelihoods.sum(dtype=np.float32)


def kept_rows(scores: np.ndarray, config: RouterConfig) -> np.ndarray:
    """Returns the indices of the rows to keep, ascending, int32.

    Rows are taken by falling score up to and including the first one whose cumulative probability exceeds `top_p`, so
    at least one is kept. All computations are in float32, whatever the dtype of the model.

    Args:
        scores: (R,) float32.
    """
    order = np.argsort(-scores, kind="stable")
    # accumulated in float64 and rounded, as torch does on the CPU
    cumulative = np.cumsum(probabilities(scores, config)[order], dtype=np.float64).astype(np.float32)
    num_below = int((cumulative <= np.float32(config.top_p)).sum())
    return np.sort(order[: num_below + 1]).astype(np.int32)


def kept_mask(scores, members, config: RouterConfig):
    """Returns which rows of each picture are kept, (B, P, L) bool: `kept_rows` inside of a graph.

    The cumulative sums are accumulated in float32, so that a row at the boundary may differ. At `top_p` 1 all are kept.

    Args:
        scores: (B, L) float32.
        members: (B, P, L) bool, the rows among which the router chooses for each picture.
    """
    if config.top_p >= 1:
        return members
    scaled = ops.broadcast_to(scores.expand_dims(1), members.shape) / config.temperature
    scaled = ops.select(members, scaled, ops.full_like(scaled, LOWEST))
    # of equal scores, the first comes first
    ordered, order = ops.TopK(sorted=True)(scaled, scaled.shape[-1])
    cumulative = ops.cumsum(ops.softmax(ordered, -1), -1)
    num_below = (cumulative <= config.top_p).astype(ms.float32).sum(-1, keepdims=True)
    rank = ops.argsort(order.astype(ms.float32), -1).astype(ms.float32)
    return ops.logical_and(members, rank <= num_below)


def kept_first(dropped):
    """Returns the order that moves dropped elements of a row behind all others, (B, L) int32.

    Args:
        dropped: (B, L) bool.
    """
    length = dropped.shape[1]
    places = ops.arange(length).astype(ms.float32) + dropped.astype(ms.float32) * length
    return ops.argsort(places, -1).astype(ms.int32)
