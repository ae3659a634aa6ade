"""Which parameters of a job train, chosen by patterns over their names, and the table that says so."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from mindspore import Parameter, nn

from mindvlm.core.errors import UserError
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.optimizer import OptimizerConfig

MAX_NEAR = 3


def choose_trainable(
    model: nn.Cell, *, freeze: Sequence[str], train: Mapping[str, Sequence[str]], freezes_all: bool = False
) -> None:
    """Sets `requires_grad` of every parameter: what `freeze` finds is frozen, then what `train` finds trains.

    Args:
        model: some of its parameters may be frozen already; `train` finds these, too.
        freeze: regular expressions, searched in the parameters' names.
        train: for each key of the job its regular expressions.
        freezes_all: freezes everything before `train` is looked at.

    Raises:
        UserError: a pattern finds nothing, or one of `train` nothing but what trains anyway.
    """
    parameters = dict(model.parameters_and_names())
    for pattern in freeze:
        for name in found_names("freeze", pattern, parameters):
            parameters[name].requires_grad = False
    if freezes_all:
        for parameter in parameters.values():
            parameter.requires_grad = False
    chosen = {}
    for key, patterns in train.items():
        for pattern in patterns:
            names = found_names(key, pattern, parameters)
            if all(parameters[name].requires_grad for name in names):
                raise UserError(
                    f"{key}: {pattern!r} finds only what trains anyway, such as {names[0]}; take it out, or freeze the "
                    "rest with freeze: ['.']"
                )
            chosen |= dict.fromkeys(names)
    for name in chosen:
        parameters[name].requires_grad = True


def found_names(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Those of the names in which the pattern is found.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    names = list(names)
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        near = ", ".join(nearest(pattern, names))
        raise UserError(f"{key}: {pattern!r} is found in no name; names are such as {near}")
    return found


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names, folded, that a pattern which is found in none may have been meant for."""
    folded = dict.fromkeys(map(fold_numbers, names))
    return sorted(folded, key=lambda name: -likeness(pattern, name))[:MAX_NEAR]


def likeness(pattern: str, name: str) -> float:
    """How near a pattern is to a name or to one of the parts between its dots, from 0 to 1."""
    plain = re.sub(r"[][()^$*+?{}|\\]", "", pattern)
    return max(difflib.SequenceMatcher(None, plain, text).ratio() for text in (name, *name.split(".")))


def require_something_trains(model: nn.Cell) -> None:
    """Raises UserError if every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in model.get_parameters()):
        raise UserError("every parameter is frozen; take something out of freeze, or name what trains in train")


def check_optimizer_patterns(model: nn.Cell, config: OptimizerConfig, say: Callable[[str], None]) -> None:
    """Looks whether the optimizer's patterns have an effect once it is chosen what trains.

    A recipe's `no_decay` names kinds of parameters whatever trains of them; only what is found nowhere is a mistake.

    Args:
        say: takes a line for each pattern of `no_decay` that is found in no name.

    Raises:
        UserError: a factor is that of no learning rate.
    """
    trains = {name: parameter.requires_grad for name, parameter in model.parameters_and_names()}
    key, earlier = "optimizer.learning_rate_factors", []
    for pattern in config.learning_rate_factors:
        trained = [name for name in found_names(key, pattern, trains) if trains[name]]
        if not trained:
            raise UserError(
                f"{key}: {pattern!r} finds nothing that trains; take it out, or let that train (model.tune, such as "
                "model.tune.vision_tower_from_layer, or train)"
            )
        if all(any(re.search(other, name) for other in earlier) for name in trained):
            raise UserError(
                f"{key}: {pattern!r} finds only what a pattern before it finds, such as {trained[0]}, and the first "
                "one holds; put it first or take it out"
            )
        earlier.append(pattern)
    for pattern in config.no_decay or ():
        if not any(re.search(pattern, name) for name in trains):
            near = ", ".join(nearest(pattern, trains))
            say(f"optimizer.no_decay: {pattern!r} is found in no name and has no effect; names are such as {near}")


def trainable_table(model: nn.Cell, specs: Mapping[str, ShardSpec]) -> list[str]:
    """Lines that say what trains: names folded over their numbers, how many tensors and parameters, and the totals.

    Args:
        specs: this rank's parts of divided parameters, which are counted whole.
    """
    groups: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in model.parameters_and_names():
        groups.setdefault((fold_numbers(name), parameter.requires_grad), []).append(full_size(name, parameter, specs))
    rows = [
        (name, f"{len(sizes)}", f"{sum(sizes):,}", "trained" if trains else "frozen")
        for (name, trains), sizes in groups.items()
    ]
    rows = [("parameters", "tensors", "numbers", ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {tensors:>{widths[1]}}  {numbers:>{widths[2]}}  {state}".rstrip()
        for name, tensors, numbers, state in rows
    ]
    trained = [size for (_, trains), sizes in groups.items() if trains for size in sizes]
    every = [size for sizes in groups.values() for size in sizes]
    share = 100 * sum(trained) / sum(every)
    lines.append(
        f"{sum(trained):,} of {sum(every):,} parameters train ({share:.3g} %), {len(trained)} of {len(every)} tensors"
    )
    return lines


def full_size(name: str, parameter: Parameter, specs: Mapping[str, ShardSpec]) -> int:
    """Numbers in a parameter of which this rank may hold a part."""
    shape = tuple(parameter.shape)
    return math.prod(specs[name].full_shape(shape) if name in specs else shape)


def fold_numbers(name: str) -> str:
    """The name with `*` for each layer number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
