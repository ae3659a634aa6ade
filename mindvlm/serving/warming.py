"""Compilation of the graphs before the first client asks, because a compilation holds up all answers."""

from PIL import Image

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.graphs import BLOCK, bucket_length
from mindvlm.generation.memory import cache_bytes
from mindvlm.generation.request import Request
from mindvlm.nn.memory import FLOAT32
from mindvlm.sessions.vision_language_model import VisionLanguageModel

RUN_SIZES = (16, 8, 4, 2, 1)
"""Blocks of a prefill run; all runs consist of these, so that few graphs are enough."""

RESERVED_BYTES = 2**30
"""A cache of this size is allocated for the whole context at once, because a cache that grows needs new graphs."""

SAMPLING = (
    GenerationConfig(max_new_tokens=2, repetition_penalty=1.1),
    GenerationConfig(max_new_tokens=2, do_sample=True, top_k=2),
    GenerationConfig(max_new_tokens=2, do_sample=True, top_k=0),
)
"""Options that need graphs of their own."""


def warm_up(model: VisionLanguageModel, num_slots: int) -> None:
    """Prepares the engine for a number of slots and compiles its graphs."""
    engine = model.engine
    engine.resize(num_slots)
    if engine.is_exact:
        num_blocks = num_slots * bucket_length(engine.max_length) // BLOCK
        engine.run_sizes = tuple(size for size in RUN_SIZES if size <= num_blocks)
        engine.reserve(reserved_length(engine))
        engine.compile_runs()
    pictures = [model.processor.picture(Image.new("RGB", (64, 64), "white"))]
    ids, features = model.prepared(model.prompter("Hello", 1), pictures)
    answer(engine, Request(ids=ids, features=features.rows, options=GenerationConfig(max_new_tokens=2)))
    for options in SAMPLING:
        answer(engine, Request(ids=[0], options=options))


def reserved_length(engine: Engine) -> int:
    """Returns the length for which the cache is allocated at once: that of the context, halved until it fits."""
    length = engine.max_length
    while len(engine.slots) * cache_bytes(engine.config, length, FLOAT32) > RESERVED_BYTES:
        length //= 2
    return length


def answer(engine: Engine, request: Request) -> None:
    """Answers a request."""
    slot = engine.add(request)
    while engine.step():
        pass
    engine.release(slot)
