"""What a new run starts from: checkpoints laid over each other, and random values where none has anything."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mindspore import nn

from mindvlm.core.errors import UserError
from mindvlm.nn.norm import norm_weights
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.config import InitConfig
from mindvlm.training.initialize import initial_values
from mindvlm.training.state import full_shape, to_tensor
from mindvlm.training.trainable import fold_numbers
from mindvlm.weights.opened import Opened, open_native

MAX_SHOWN = 6
NUM_COMPARED = 64


def fill_weights(
    model: nn.Cell,
    config: InitConfig,
    *,
    seed: int,
    fit: Callable[..., np.ndarray],
    specs: Mapping[str, ShardSpec],
    say: Callable[[str], None],
) -> set[str]:
    """Gives every parameter its first values and says where they come from.

    Args:
        model: to be filled.
        config: the checkpoints, and what may be random.
        seed: of random values.
        fit: what a tensor of a checkpoint becomes in the model, see `Family.make_fit`.
        specs: this rank's parts of divided parameters.
        say: takes a line for each checkpoint and one for what is random.

    Returns:
        Names of the parameters whose values are in no checkpoint as they are: random ones, and those made to fit.

    Raises:
        UserError: a checkpoint cannot be used or gives nothing, or a parameter is in none of them and not among
            `config.random`.
    """
    shapes = {name: full_shape(name, parameter, specs) for name, parameter in model.parameters_and_names()}
    norms = norm_weights(model)
    with contextlib.ExitStack() as stack:
        places = lay_checkpoints(stack, config.weights, shapes, say)
        if config.weights:
            say_random(shapes, places, config, say)
        made, fitted = set(), []
        for name, parameter in model.parameters_and_names():
            if name in places:
                place = places[name]
                stored = place.source.read(name).to_float32()
                array = fit(name, stored, shapes, seed=seed, description=place.config)
                if array is not stored:
                    fitted.append(name)
            else:
                array = initial_values(name, shapes[name], seed, norm_weights=norms)
                made.add(name)
            part = specs[name].take(array) if name in specs else array
            parameter.set_data(to_tensor(part, parameter.dtype))
    if fitted:
        say(f"made to fit: {summarize(fitted)}")
    return made | set(fitted)


def identify_weights(paths: list[str]) -> str:
    """A text that is another one if the checkpoints are: a digest of names, shapes and some values of all tensors."""
    digest = hashlib.sha256()
    for path in paths:
        with open_native([path]) as opened:
            for name, info in sorted(opened.source.infos.items()):
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                count = min(info.num_elements, NUM_COMPARED)
                digest.update(opened.source.read_range(name, 0, count).tobytes())
                digest.update(opened.source.read_range(name, info.num_elements - count, info.num_elements).tobytes())
    return digest.hexdigest()


def lay_checkpoints(
    stack: contextlib.ExitStack, paths: list[str], shapes: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Opened]:
    """For each parameter that a checkpoint has, the last one that has it."""
    places: dict[str, Opened] = {}
    for path in paths:
        opened = stack.enter_context(open_native([path]))
        used = [name for name in opened.source.infos if name in shapes]
        unused = [name for name in opened.source.infos if name not in shapes]
        if not used:
            raise UserError(f"init.weights: {path} has no tensor of this model; leave it out")
        places |= dict.fromkeys(used, opened)
        left_out = f", left out: {summarize(unused)}" if unused else ""
        say(f"weights from {path}: {summarize(used)}{left_out}")
    return places


def say_random(
    shapes: Mapping[str, Any], places: Mapping[str, Any], config: InitConfig, say: Callable[[str], None]
) -> None:
    missing = [name for name in shapes if name not in places]
    for pattern in config.random:
        if not any(re.search(pattern, name) for name in missing):
            raise UserError(f"init.random: {pattern!r} fits no parameter that the checkpoints lack; take it out")
    refused = [name for name in missing if not any(re.search(pattern, name) for pattern in config.random)]
    if refused:
        raise UserError(
            f"init.weights give nothing for {summarize(refused)}; add a checkpoint that has them, or what may start "
            "at random to init.random"
        )
    if missing:
        say(f"at random: {summarize(missing)}")


def summarize(names: list[str]) -> str:
    """Names with their numbers folded: "24 language_model.layers.*.mlp.up_proj.weight, ..."."""
    counts = Counter(map(fold_numbers, names))
    shown = [f"{count} {pattern}" if count > 1 else pattern for pattern, count in counts.most_common(MAX_SHOWN)]
    more = sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_SHOWN))
    return f"{len(names)} tensors ({', '.join(shown)}{f' and {more} more' if more else ''})"
