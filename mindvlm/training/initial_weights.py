"""Initial weights of a new run: checkpoints overlaid in order, and random values for the remaining parameters."""

import contextlib
import functools
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import nn

from mindvlm.checkpoint import MemorySource
from mindvlm.core.errors import UserError
from mindvlm.models.base import FitTensor, InitialRule
from mindvlm.models.registry import convertible_models
from mindvlm.nn.norm import norm_weights
from mindvlm.nn.parameters import load_target, read_rows, stored_tensors
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.config import InitConfig
from mindvlm.training.run_tensors import full_shape
from mindvlm.training.trainable import fold_numbers
from mindvlm.weights.opened import Opened, open_native
from mindvlm.weights.rules.table import CONNECTORS
from mindvlm.weights.trained_parts import PartFiles

logger = logging.getLogger(__name__)

MAX_SHOWN = 6
NUM_COMPARED = 64

INITIAL_RULES = (
    InitialRule(r"\.bias$", "constant", 0.0),
    InitialRule(r"pos_embed$|position_embedding\.weight$|class_embedding$", "absolute", 0.3),
    InitialRule(r"embed_tokens\.weight$", "absolute", 0.5),
    InitialRule(r"lm_head\.weight$", "fan_in", 0.5),
    InitialRule(r"(o_proj|down_proj|out_proj|fc2)\.weight$", "fan_in", 0.35),
    InitialRule(r"patch_embed|patch_embedding", "fan_in", 1.0),
    InitialRule(r"", "fan_in", 0.7),
)
"""Rules for all families. With these scales Vary-nano learns to find the text in its images: position tables are
visible beside the patches, branches start small beside the residual stream, and the logits are of order 1."""

TIED_EMBEDDINGS = InitialRule(r"embed_tokens\.weight$", "width", 0.5)
"""Scale of token embeddings that are also the head."""


def fill_weights(
    model: nn.Cell,
    config: InitConfig,
    *,
    seed: int,
    fit: FitTensor,
    rules: Sequence[InitialRule],
    specs: Mapping[str, ShardSpec],
    part_files: PartFiles | None = None,
) -> set[str]:
    """Initializes every parameter and logs the origin of the values.

    Args:
        model: the model to fill.
        config: the checkpoints, and the parameters that may be random.
        seed: seed of random values.
        fit: adapts a tensor of a checkpoint to the model, see `Family.make_fit`.
        rules: scales of random values, before `INITIAL_RULES`.
        specs: this rank's parts of divided parameters.
        part_files: the files of single parts; a message names those that are missing.

    Returns:
        Names of parameters whose values are in no checkpoint and are not computed: random and adapted ones.

    Raises:
        UserError: a checkpoint cannot be used, holds NaN or infinity, or contributes nothing, or a parameter is in no
            checkpoint and does not match `config.random`.
    """
    shapes = {name: full_shape(name, parameter, specs) for name, parameter in model.parameters_and_names()}
    norms = norm_weights(model)
    if not any(name.endswith("lm_head.weight") for name in shapes):
        rules = (*rules, TIED_EMBEDDINGS)
    with contextlib.ExitStack() as stack:
        places = lay_checkpoints(stack, config.weights, shapes)
        computed = {name for name in shapes if name not in norms and rule_of(name, rules).compute}
        if config.weights:
            check_random([name for name in shapes if name not in computed], places, config, part_files)
        made, fitted = set(), []
        for name, target in stored_tensors(model).items():
            if name in places:
                place = places[name]
                stored = place.source.read(name).to_float32()
                try:
                    array = fit(name, stored, shapes, seed=seed, description=place.config)
                except UserError as error:
                    raise UserError(
                        f"init.weights: {place.inputs[0].checkpoint.path}: {error}; give weights of these sizes, or "
                        "correct the section model"
                    ) from None
                if array is not stored:
                    fitted.append(name)
            else:
                array = initial_values(name, shapes[name], seed, norm_weights=norms, rules=rules)
                made |= {name} - computed
            part = specs[name].take(array) if name in specs else array
            load_target(target, functools.partial(read_rows, MemorySource({name: part}), name))
    if fitted:
        logger.info(f"adapted: {summarize(fitted)}")
    return made | set(fitted)


def identify_weights(paths: list[str]) -> str:
    """Returns a digest of the names, shapes and some values of all tensors, which identifies the checkpoints."""
    digest = hashlib.sha256()
    for path in paths:
        with open_native([path], convertible_models()) as opened:
            for name, info in sorted(opened.source.infos.items()):
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                count = min(info.num_elements, NUM_COMPARED)
                digest.update(opened.source.read_range(name, 0, count).tobytes())
                digest.update(opened.source.read_range(name, info.num_elements - count, info.num_elements).tobytes())
    return digest.hexdigest()


def lay_checkpoints(stack: contextlib.ExitStack, paths: list[str], shapes: Mapping[str, Any]) -> dict[str, Opened]:
    """Returns, for each parameter in any checkpoint, the last checkpoint that has it."""
    places: dict[str, Opened] = {}
    for path in paths:
        opened = stack.enter_context(open_native([path], convertible_models(), require_finite=True))
        used = [name for name in opened.source.infos if name in shapes]
        unused = [name for name in opened.source.infos if name not in shapes]
        if not used:
            raise UserError(
                f"init.weights: {path} has no tensor of this model, it has {summarize(unused)}; leave it out, or "
                "correct the section model"
            )
        connector = [name for name in used if opened.model.parts_of([name]) == {CONNECTORS}]
        if half := opened.model.native.rest_of_units(connector, shapes):
            raise UserError(
                f"init.weights: {path} has half of a connector, without {summarize(half)}; give the whole connector"
            )
        places |= dict.fromkeys(used, opened)
        left_out = f", left out: {summarize(unused)}" if unused else ""
        logger.info(f"weights from {path}: {summarize(used)}{left_out}")
    return places


def check_random(
    names: Collection[str], places: Mapping[str, Any], config: InitConfig, part_files: PartFiles | None
) -> None:
    missing = [name for name in names if name not in places]
    for pattern in config.random:
        if not any(re.search(pattern, name) for name in missing):
            raise UserError(f"init.random: {pattern!r} matches no parameter that the checkpoints lack; remove it")
    refused = [name for name in missing if not any(re.search(pattern, name) for pattern in config.random)]
    if refused:
        files = part_files.holding(refused) if part_files else []
        named = f", such as the {' and the '.join(files)} of an earlier run" if files else ""
        raise UserError(
            f"init.weights have no values for {summarize(refused)}; add a checkpoint that has them{named}, or add "
            "them to init.random"
        )
    if missing:
        logger.info(f"initialized at random: {summarize(missing)}")


def summarize(names: list[str]) -> str:
    """Summarizes names with folded layer numbers: "24 language_model.layers.*.mlp.up_proj.weight, ..."."""
    counts = Counter(map(fold_numbers, names))
    shown = [f"{count} {pattern}" if count > 1 else pattern for pattern, count in counts.most_common(MAX_SHOWN)]
    more = sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_SHOWN))
    return f"{len(names)} tensors ({', '.join(shown)}{f' and {more} more' if more else ''})"


def initial_values(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    *,
    norm_weights: frozenset[str],
    rules: Sequence[InitialRule],
) -> np.ndarray:
    """Returns the float32 values of one parameter as a function of name, shape and seed.

    Args:
        norm_weights: names of normalization weights, which start as ones.
        rules: rules of the family, before `INITIAL_RULES`.
    """
    if name in norm_weights:
        return np.ones(shape, dtype=np.float32)
    rule = rule_of(name, rules)
    if rule.compute:
        return rule.compute(shape)
    kind, scale = rule.kind, rule.scale
    if kind == "constant":
        return np.full(shape, scale, dtype=np.float32)
    if kind == "fan_in":
        scale /= math.sqrt(math.prod(shape[1:]))
    if kind == "width":
        scale /= math.sqrt(shape[-1])
    if kind == "depth":
        scale /= math.sqrt(2 * (1 + int(re.search(r"\.(\d+)\.", name)[1])))
    rng = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def rule_of(name: str, rules: Sequence[InitialRule]) -> InitialRule:
    """Returns the first rule for a parameter; `rules` take precedence over `INITIAL_RULES`."""
    return next(rule for rule in (*rules, *INITIAL_RULES) if re.search(rule.pattern, name))
