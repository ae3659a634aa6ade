"""SliME's router: chooses local feature rows by their similarity to the text of the prompt. It has no parameters.

R local rows, L tokens of text.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindvlm.models.slime.model_config import RouterConfig

# least norm of a vector in a cosine
NORM_EPS = 1e-8


def text_direction(embeds, mask):
    """Returns the sum of the normalized embeddings of the text, (hidden,) float32.

    Args:
        embeds: (L, hidden).
        mask: (L,) float32, 0 for padding.
    """
    return ops.matmul(mask.reshape((1, -1)), normalized(embeds)).reshape((-1,))


def router_scores(rows, direction):
    """Returns the sum over the tokens of text of the cosine with each row, (R,) float32.

    The cosines are summed before the product: it is linear in the normalized text.

    Args:
        rows: (R, hidden).
        direction: (hidden,) float32, see `text_direction`.
    """
    return ops.matmul(normalized(rows), direction.reshape((-1, 1))).reshape((-1,))


def normalized(x):
    """Returns the rows of x (..., hidden) with norm 1, in float32; zero rows stay zero."""
    x = x.astype(ms.float32)
    norm = ops.sqrt((x * x).sum(-1, keepdims=True))
    return x / ops.maximum(norm, ms.Tensor(NORM_EPS, ms.float32))


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
