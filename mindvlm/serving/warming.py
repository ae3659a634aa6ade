"""Compilation of the graphs before the first client asks, because a compilation holds up all answers."""

import numpy as np
from PIL import Image

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.graphs import BLOCK, bucket_length
from mindvlm.generation.memory import cache_bytes
from mindvlm.generation.request import Request
from mindvlm.nn.memory import FLOAT32
from mindvlm.processing.images.picture import Picture
from mindvlm.serving.settings import MEBIBYTE
from mindvlm.sessions.vision_language_model import VisionLanguageModel

RUN_SIZES = (16, 8, 4, 2, 1)
"""Blocks of a prefill run; all runs consist of these, so that few graphs are enough."""

BATCH_SIZES = (4, 2, 1)
"""Views that are encoded together."""

MAX_BATCH_BYTES = 4 * MEBIBYTE
"""Pixels of such a batch for one tower."""

RESERVED_BYTES = 2**30
"""A cache of this size is allocated for the whole context at once, because a cache that grows needs new graphs."""

OPTIONS = (
    GenerationConfig(max_new_tokens=2),
    GenerationConfig(max_new_tokens=2, repetition_penalty=1.1),
    GenerationConfig(max_new_tokens=2, do_sample=True, top_k=2),
    GenerationConfig(max_new_tokens=2, do_sample=True, top_k=0),
)
"""Options that need graphs of their own."""


def warm_up(model: VisionLanguageModel, num_slots: int) -> None:
    """Prepares the engine for a number of slots and compiles its graphs, but those of pictures if it `is_exact`."""
    engine = model.engine
    engine.resize(num_slots)
    if engine.is_exact:
        num_blocks = num_slots * bucket_length(engine.max_length) // BLOCK
        engine.run_sizes = tuple(size for size in RUN_SIZES if size <= num_blocks)
        engine.reserve(reserved_length(engine))
        engine.compile_runs()
    else:
        # a prompt with a picture has graphs of its own
        ids, features = model.prepared(model.prompter("Hello", 1), [white_picture(model)])
        answer(engine, Request(ids=ids, features=features.rows, options=GenerationConfig(max_new_tokens=2)))
    for options in OPTIONS:
        answer(engine, Request(ids=[0], options=options))


def warm_pictures(model: VisionLanguageModel) -> None:
    """Compiles the graphs of pictures of an engine that `is_exact`, and sets how many views are encoded together."""
    model.encoder.batch_sizes = exact_batch_sizes(model)
    model.encoder.encode_views([white_picture(model)])


def white_picture(model: VisionLanguageModel) -> Picture:
    return model.processor.picture(Image.new("RGB", (64, 64), "white"))


def reserved_length(engine: Engine) -> int:
    """Returns the length for which the cache is allocated at once: that of the context, halved until it fits."""
    length = engine.max_length
    while len(engine.slots) * cache_bytes(engine.config, length, FLOAT32) > RESERVED_BYTES:
        length //= 2
    return length


def exact_batch_sizes(model: VisionLanguageModel) -> tuple[int, ...]:
    """Returns the numbers of small views that are encoded together: those at which all have the bits of single ones.

    Large views keep all threads busy alone.
    """
    (view, *_) = white_picture(model).views
    shapes = [array.shape for array in vars(view).values()]
    random = np.random.default_rng(0)
    pixels = [random.standard_normal((max(BATCH_SIZES), *shape), np.float32) for shape in shapes]
    if pixels[0].nbytes > MAX_BATCH_BYTES:
        return (1,)
    encode, count = model.engine.encode_images, max(BATCH_SIZES)
    alone = np.concatenate([encode(*(one[n : n + 1] for one in pixels)).asnumpy() for n in range(count)])
    return tuple(
        size
        for size in BATCH_SIZES
        if size == 1 or np.array_equal(encode(*(one[:size] for one in pixels)).asnumpy(), alone[:size])
    )


def answer(engine: Engine, request: Request) -> None:
    """Answers a request."""
    slot = engine.add(request)
    while engine.step():
        pass
    engine.release(slot)
