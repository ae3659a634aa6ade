"""The memory checks of `mindvlm-check`: the needs of a run beside the free memory, and plans for several devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.core.host_memory import free_host_memory
from mindvlm.core.weight_formats import WEIGHT_FORMATS, parse_weights
from mindvlm.processing.images.documents import DEFAULT_QUERY
from mindvlm.tools.preflight import FAILED, MIB, OK, SKIPPED, WARNING, Lines, Run, mib

WORLD_SIZES = (1, 2, 4, 8)
# the NPUs' memories, of which a tenth is left to the driver, the runtime and communication
NPU_GIB, NPU_SHARE = (32, 64), 0.9
GIB = 1024 * MIB


def check_memory(run: Run) -> Lines:
    """Compares the needs of loading, the first token and a full context with the free memory."""
    from mindvlm.checkpoint import TensorInfo
    from mindvlm.checkpoint.dtypes import item_size
    from mindvlm.core import runtime
    from mindvlm.generation import memory
    from mindvlm.nn.memory import VisionMemory
    from mindvlm.parallel.sharding import shard_infos

    config, size = run.config.model, item_size(run.dtype)
    num_processes = run.config.tensor_parallel or 1
    find_vision = run.family.vision_memory
    num_tokens = prompt_length(run)
    infos = {} if run.weights is None else run.weights.infos
    whole = [infos.get(name) or TensorInfo(name, "float32", shape) for name, shape in run.model_parameters.items()]
    weights = shard_infos(whole, specs_for(run, num_processes))

    def estimate(model_config, text: str = run.config.weights) -> memory.MemoryEstimate:
        formats = parse_weights(text) if run.kernels else {}
        # float32 weights are computed without the kernels
        has_kernels = any(value != "float32" for value in formats.values())
        return memory.estimate_memory(
            model_config,
            weights,
            find_vision(model_config, size, has_kernels) if find_vision else VisionMemory(),
            num_images=run.arguments.num_images,
            num_prompt_tokens=num_tokens,
            dtype=run.dtype,
            on_host=run.device == "CPU",
            num_processes=num_processes,
            formats=formats if has_kernels else None,
        )

    needed = estimate(config)
    free = free_host_memory() if run.device == "CPU" else runtime.free_device_memory()
    if free is not None and run.device == "CPU":
        # the processes are taken to run on this machine
        free //= num_processes
    text = (
        f"load {mib(needed.load)}, prompt of {num_tokens} tokens with {counted(run.arguments.num_images, 'picture')} "
        f"{mib(needed.prefill)}, context of {config.max_length} tokens {mib(needed.decode)}"
    )
    if num_processes > 1:
        text = f"each of {num_processes} processes: {text}"
    if run.device != "CPU":
        text += " (never measured on an NPU; its runtime comes on top)"
    by_format = {name: estimate(config, name) for name in WEIGHT_FORMATS[1:]} if run.kernels else {}
    fitting = [name for name, found in by_format.items() if free is not None and found.prefill <= free]
    if free is None:
        yield OK, f"{text}; the free memory is unknown here"
    elif needed.peak <= free:
        yield OK, f"{text}; {mib(free)} are free"
    elif max(needed.load, needed.prefill) <= free:
        length = longest_context(config, lambda changed: estimate(changed).peak <= free, at_least=num_tokens)
        remedy = f"set model.max_length to {length} or less, or end other programs"
        yield WARNING, f"{text}, but {mib(free)} are free: {remedy}"
    else:
        if run.device != "CPU":
            remedy = "take a smaller model" + (", or set dtype: float16" if run.dtype == "float32" else "")
        elif fitting:
            remedy = f"set weights: {fitting[0]}, or end other programs"
        else:
            remedy = "end other programs, or take a machine with more memory or a smaller model"
        yield FAILED, f"{text}, but {mib(free)} are free: {remedy}"
    if by_format:
        sizes = [
            f"{name} {mib(found.prefill)}" + ("" if free is None or name in fitting else " (does not fit)")
            for name, found in by_format.items()
        ]
        yield OK, f"until the first answer with weights: {', '.join(sizes)}"


def check_plan(run: Run) -> Lines:
    """Counts the memory of each NPU when several share the weights, for a prompt that fills the context."""
    from mindvlm.checkpoint import TensorInfo
    from mindvlm.checkpoint.dtypes import item_size
    from mindvlm.generation.memory import estimate_memory
    from mindvlm.nn.memory import VisionMemory
    from mindvlm.parallel.sharding import shard_infos

    length, num_slots = run.arguments.max_length or run.config.model.max_length, run.arguments.num_slots
    config = dataclasses.replace(run.config.model, max_length=length)
    whole = [TensorInfo(name, "float32", shape) for name, shape in run.model_parameters.items()]
    yield OK, f"each NPU, {counted(num_slots, 'slot')} of {length} tokens (computed, never measured on an NPU):"
    smallest = math.inf
    for num_processes in WORLD_SIZES:
        named = "1 process" if num_processes == 1 else f"{num_processes} processes"
        try:
            weights = shard_infos(whole, specs_for(run, num_processes))
        except UserError as error:
            yield SKIPPED, f"{named}: not possible, {error}"
            continue
        found = {}
        for dtype in ("bfloat16", "float32"):
            find = run.family.vision_memory
            found[dtype] = estimate_memory(
                config,
                weights,
                find(config, item_size(dtype), False) if find else VisionMemory(),
                num_images=run.arguments.num_images,
                num_prompt_tokens=length,
                dtype=dtype,
                on_host=False,
                num_slots=num_slots,
                num_processes=num_processes,
            )
        half, full = found.values()
        smallest = min(smallest, half.prefill)
        parts = f"weights {mib(half.parameters)}, cache {mib(half.prompt_cache)}, activations {mib(half.activations)}"
        yield OK, f"{named}: {parts} in 16 bits, {held_by(half.prefill)}; float32 {held_by(full.prefill)}"
    is_asked_for = run.arguments.max_length is not None or num_slots > 1
    if is_asked_for and smallest_npu(smallest) is None:
        yield FAILED, f"no NPU holds {counted(num_slots, 'slot')} of {length} tokens; lower --num_slots or --max_length"


def check_job_plan(run: Run) -> Lines:
    """Counts the memory of each device of a training job. A job that does not fit its device fails the check."""
    from mindvlm.training.memory import estimate_training

    config = run.config
    on_cpu = config.device == "cpu"
    dtype = "float32" if on_cpu else config.dtype
    found = estimate_training(config, run.model_config, run.family, dtype=dtype)
    parts = ", ".join(
        f"{part} {mib(getattr(found, part))}" for part in ("weights", "gradients", "optimizer", "activations")
    )
    text = f"each device: {parts} in {dtype}, "
    if on_cpu:
        free = free_host_memory()
        fits = free is None or config.parallel.dp * config.parallel.tp * found.total <= free
        text += f"{mib(found.total)}, " + ("of unknown free memory" if free is None else f"{mib(free)} are free")
    else:
        fits = smallest_npu(found.total) is not None
        text += f"{held_by(found.total)} (computed, never measured on an NPU)"
    remedy = "; lower data.batch_size or data.max_length, set recompute: true, divide it by parallel, or train adapters"
    yield (OK, text) if fits else (FAILED, text + remedy)
    if found.uncounted:
        yield WARNING, f"not counted: {found.uncounted}"


def specs_for(run: Run, num_processes: int) -> dict:
    """Returns the parts of the first of several processes; raises UserError if they cannot share the model."""
    from mindvlm.parallel.mesh import Mesh
    from mindvlm.parallel.plan import plan_specs

    return plan_specs(run.model, run.family.tensor_parallel, Mesh(tp=num_processes))


def held_by(num_bytes: int) -> str:
    """Returns a size with the smallest NPU that holds it."""
    holding = smallest_npu(num_bytes)
    fits = f"fits {holding} GB" if holding else f"does not fit {NPU_GIB[-1]} GB"
    return f"{num_bytes / GIB:.1f} GiB ({fits})"


def smallest_npu(num_bytes: int) -> int | None:
    """Returns the memory in GiB of the smallest NPU that holds that much; None if none does."""
    return next((size for size in NPU_GIB if num_bytes <= NPU_SHARE * size * GIB), None)


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
    pictures, max_length = counted(num_images, "picture"), run.config.model.max_length
    if run.family.output == "pictures":
        # the context is for pictures only, and is filled
        return asked or max_length - run.config.model.num_picture_codes
    length = run.config.model.image_token_len
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
