"""The memory check of `mindvlm-check`: compares the needs of a run with the free memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.core.host_memory import free_host_memory
from mindvlm.tools.predict_llm import DEFAULT_QUERY
from mindvlm.tools.preflight import OK, WARNING, Lines, Run, mib


def check_memory(run: Run) -> Lines:
    """Compares the needs of loading, the first token and a full context with the free memory."""
    from mindvlm.checkpoint import TensorInfo
    from mindvlm.checkpoint.dtypes import item_size
    from mindvlm.core import runtime
    from mindvlm.generation import memory
    from mindvlm.nn.memory import VisionMemory

    config, size = run.config.model, item_size(run.dtype)
    vision = run.family.vision_memory(config, size) if run.family.vision_memory else VisionMemory()
    num_tokens = prompt_length(run)
    infos = {} if run.weights is None else run.weights.infos
    weights = [infos.get(name) or TensorInfo(name, "float32", shape) for name, shape in run.model_parameters.items()]

    def estimate(model_config) -> memory.MemoryEstimate:
        return memory.estimate_memory(
            model_config,
            weights,
            vision,
            num_images=run.arguments.num_images,
            num_prompt_tokens=num_tokens,
            dtype=run.dtype,
            on_host=run.device == "CPU",
        )

    needed = estimate(config)
    free = free_host_memory() if run.device == "CPU" else runtime.free_device_memory()
    text = (
        f"load {mib(needed.load)}, prompt of {num_tokens} tokens with {counted(run.arguments.num_images, 'picture')} "
        f"{mib(needed.prefill)}, context of {config.max_length} tokens {mib(needed.decode)}"
    )
    if run.device != "CPU":
        text += " (never measured on an NPU; its runtime comes on top)"
    if free is None:
        yield OK, f"{text}; the free memory is unknown here"
    elif needed.peak <= free:
        yield OK, f"{text}; {mib(free)} are free"
    else:
        length = longest_context(config, lambda changed: estimate(changed).peak <= free, at_least=num_tokens)
        if length:
            remedy = f"set model.max_length to {length} or less, or end other programs"
        elif run.device == "CPU":
            remedy = "end other programs, or take a machine with more memory or a smaller model"
        else:
            remedy = "take a smaller model" + (", or set dtype: float16" if run.dtype == "float32" else "")
        yield WARNING, f"{text}, but {mib(free)} are free: {remedy}"


def longest_context(config, fits: Callable[[Any], bool], *, at_least: int) -> int | None:
    """Returns the largest half, quarter, ... of `max_length` that fits and still holds the prompt, else None."""
    length = config.max_length // 2
    while length >= at_least:
        if fits(dataclasses.replace(config, max_length=length)):
            return length
        length //= 2
    return None


def prompt_length(run: Run) -> int:
    """Returns the length of the prompt to assume: the option, or that of the default question with its pictures, of
    which large ones may take more tokens than small ones.

    Raises:
        UserError: the pictures alone are longer than the option says, or the prompt is longer than the context.
    """
    num_images, asked = run.arguments.num_images, run.arguments.num_prompt_tokens
    pictures = counted(num_images, "picture")
    length, max_length = run.config.model.image_token_len, run.config.model.max_length
    shortest, longest = run.processor.picture_lengths if run.processor else (length, length)
    if asked is not None and asked < num_images * shortest:
        raise UserError(f"--num_prompt_tokens is {asked} but {pictures} take {num_images * shortest} tokens; raise it")
    num_tokens = asked or question_length(run, shortest)
    if num_tokens > max_length:
        raise UserError(
            f"a prompt of {num_tokens} tokens with {pictures} is longer than the context of {max_length}; "
            "raise model.max_length or give fewer pictures"
        )
    return asked or min(question_length(run, longest), max_length)


def question_length(run: Run, picture_length: int) -> int:
    """Returns the length of the default question with pictures of that many tokens each."""
    lengths = [picture_length] * run.arguments.num_images
    if not run.processor:
        return sum(lengths) + 64
    return len(run.processor.prompt(DEFAULT_QUERY, num_images=len(lengths), image_lengths=lengths).input_ids)
