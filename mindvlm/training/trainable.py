"""Selects the trained parameters of a job by patterns over names, and prints them as a table."""

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from mindspore import Parameter, nn

from mindvlm.core.errors import UserError
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)

MAX_NEAR = 3
TRAINED, UNUSED, CONSTANT = "trained", "no output depends on it", "the model keeps it constant"


def choose_trainable(
    model: ImageTextModel, *, freeze: Sequence[str], train: Mapping[str, Sequence[str]], freezes_all: bool = False
) -> None:
    """Sets `requires_grad` of every parameter: freezes the matches of `freeze`, then unfreezes those of `train`.

    Constants, and parameters that no output depends on, never train; weight decay would change them.

    Args:
        model: some parameters may already be frozen; `train` applies to them too.
        freeze: regular expressions, searched in parameter names.
        train: regular expressions for each key of the job.
        freezes_all: freezes everything before `train` applies.

    Raises:
        UserError: a pattern matches nothing, or a pattern of `train` matches only parameters that train anyway or
            cannot train.
    """
    parameters = dict(model.parameters_and_names())
    never = untrainable(model)
    for name in never:
        parameters[name].requires_grad = False
    for pattern in freeze:
        for name in found_names("freeze", pattern, parameters):
            parameters[name].requires_grad = False
    if freezes_all:
        for parameter in parameters.values():
            parameter.requires_grad = False
    chosen = {}
    for key, patterns in train.items():
        for pattern in patterns:
            found = found_names(key, pattern, parameters)
            names = [name for name in found if name not in never]
            if not names:
                raise UserError(
                    f"{key}: {pattern!r} matches only parameters that cannot train, such as {found[0]} "
                    f"({never[found[0]]}); remove it"
                )
            if all(parameters[name].requires_grad for name in names):
                raise UserError(
                    f"{key}: {pattern!r} matches only parameters that train anyway, such as {names[0]}; remove it, or "
                    "freeze the rest with freeze: ['.']"
                )
            chosen |= dict.fromkeys(names)
    for name in chosen:
        parameters[name].requires_grad = True


def untrainable(model: ImageTextModel) -> dict[str, str]:
    """Returns name -> reason of the parameters that never train."""
    constant = dict.fromkeys(names_of(model.constant_parameters, model), CONSTANT)
    return constant | dict.fromkeys(names_of(model.unused_parameters, model), UNUSED)


def names_of(parameters: Iterable[Parameter], model: nn.Cell) -> set[str]:
    """Returns the names of some of the model's parameters."""
    ids = set(map(id, parameters))
    return {name for name, parameter in model.parameters_and_names() if id(parameter) in ids}


def found_names(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the names that match a pattern.

    Raises:
        UserError: no name matches; the message lists the nearest names.
    """
    names = list(names)
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        near = ", ".join(nearest(pattern, names))
        raise UserError(f"{key}: {pattern!r} matches no name; some names are {near}")
    return found


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the folded names nearest to a pattern that matches none."""
    folded = dict.fromkeys(map(fold_numbers, names))
    return sorted(folded, key=lambda name: -likeness(pattern, name))[:MAX_NEAR]


def likeness(pattern: str, name: str) -> float:
    """Returns the similarity, from 0 to 1, of a pattern and a name or one of its dotted parts."""
    plain = re.sub(r"[][()^$*+?{}|\\]", "", pattern)
    return max(difflib.SequenceMatcher(None, plain, text).ratio() for text in (name, *name.split(".")))


def require_something_trains(model: nn.Cell) -> None:
    """Raises UserError if every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in model.get_parameters()):
        raise UserError("every parameter is frozen; remove a pattern from freeze, or add one to train")


def check_optimizer_patterns(model: nn.Cell, config: OptimizerConfig) -> None:
    """Checks that the optimizer's patterns have an effect on the selected parameters.

    A recipe's `no_decay` names kinds of parameters, of which some may not train; a pattern without a match is logged.

    Raises:
        UserError: a learning rate factor applies to no trained parameter.
    """
    trains = {name: parameter.requires_grad for name, parameter in model.parameters_and_names()}
    key, earlier = "optimizer.learning_rate_factors", []
    for pattern in config.learning_rate_factors:
        trained = [name for name in found_names(key, pattern, trains) if trains[name]]
        if not trained:
            raise UserError(
                f"{key}: {pattern!r} matches no parameter that trains; remove it, or train the parameter "
                f"({', '.join((*model.freezing_keys, 'train'))})"
            )
        if all(any(re.search(other, name) for other in earlier) for name in trained):
            raise UserError(
                f"{key}: {pattern!r} matches only what an earlier pattern matches, such as {trained[0]}, and the first "
                "match applies; move it up or remove it"
            )
        earlier.append(pattern)
    for pattern in config.no_decay or ():
        if not any(re.search(pattern, name) for name in trains):
            near = ", ".join(nearest(pattern, trains))
            logger.info(f"optimizer.no_decay: {pattern!r} matches no name and has no effect; some names are {near}")


def trainable_table(model: ImageTextModel, specs: Mapping[str, ShardSpec]) -> list[str]:
    """Returns the lines of the table of trained parameters: folded names, numbers of tensors and parameters, totals.

    Args:
        specs: this rank's parts of divided parameters; they count in full size.
    """
    never = {name: f"frozen: {reason}" for name, reason in untrainable(model).items()}
    groups: dict[tuple[str, str], list[int]] = {}
    for name, parameter in model.parameters_and_names():
        state = TRAINED if parameter.requires_grad else never.get(name, "frozen")
        groups.setdefault((fold_numbers(name), state), []).append(full_size(name, parameter, specs))
    rows = [(name, f"{len(sizes)}", f"{sum(sizes):,}", state) for (name, state), sizes in groups.items()]
    rows = [("parameters", "tensors", "numbers", ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {tensors:>{widths[1]}}  {numbers:>{widths[2]}}  {state}".rstrip()
        for name, tensors, numbers, state in rows
    ]
    trained = [size for (_, state), sizes in groups.items() if state == TRAINED for size in sizes]
    every = [size for sizes in groups.values() for size in sizes]
    share = 100 * sum(trained) / sum(every)
    lines.append(
        f"{sum(trained):,} of {sum(every):,} parameters train ({share:.3g} %), {len(trained)} of {len(every)} tensors"
    )
    return lines


def full_size(name: str, parameter: Parameter, specs: Mapping[str, ShardSpec]) -> int:
    """Returns the number of elements of the full parameter, of which this rank may have a part."""
    shape = tuple(parameter.shape)
    return math.prod(specs[name].full_shape(shape) if name in specs else shape)


def fold_numbers(name: str) -> str:
    """Replaces each layer number in a name by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
