"""Tensor parallelism as a plan that is applied to a built model: which Cells are divided over the ranks, and how."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mindspore import Parameter, nn

from mindvlm.core.errors import UserError
from mindvlm.nn.linear import TiedHead
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.nn.parameters import name_by_place
from mindvlm.parallel.layers import (
    ColumnParallelLinear,
    EnteringLayerNorm,
    EnteringRMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabParallelTiedHead,
)
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class Rule:
    """How to divide the Cells whose whole dotted name matches `pattern`.

    Kinds: "enter": a norm before column-parallel layers; "column", "row": Linears; "vocabulary": the token embedding;
    "head": a Linear or TiedHead over the vocabulary; "heads": a Cell with `num_heads`, or a config with
    `num_attention_heads`, to divide; "partial": parameters of a Cell that every rank holds whole and uses for its own
    heads, so that their gradients are summed over the ranks.
    """

    pattern: str
    kind: Literal["enter", "column", "row", "vocabulary", "head", "heads", "partial"]
    num_sections: int = 1


DECODER = (
    Rule(r"language_model", "heads"),
    Rule(r"language_model\.embed_positions", "heads"),
    Rule(r"language_model\.embed_tokens", "vocabulary"),
    Rule(r"language_model\.layers\.\d+\.(input|post_attention)_layernorm", "enter"),
    Rule(r"language_model\.layers\.\d+\.self_attn", "heads"),
    Rule(r"language_model\.layers\.\d+\.self_attn\.[qkv]_proj", "column"),
    Rule(r"language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|fc1)", "column"),
    Rule(r"language_model\.layers\.\d+\.(self_attn\.o_proj|mlp\.(down_proj|fc2))", "row"),
    Rule(r"language_model\.norm", "enter"),
    Rule(r"language_model\.lm_head", "head"),
)
"""The causal language model of every family."""

VISION_TRANSFORMER = (
    Rule(r"vision_tower\.encoder\.layers\.\d+\.layer_norm[12]", "enter"),
    Rule(r"vision_tower\.encoder\.layers\.\d+\.self_attn\.core", "heads"),
    Rule(r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)", "column"),
    Rule(r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)", "row"),
)
"""CLIP's tower."""


@dataclass
class ParallelModel:
    """The division of a model.

    Attributes:
        specs: the rank's part of each divided parameter; all other parameters are whole on every rank.
        partial: names of whole parameters whose gradients must be summed over the tensor-parallel ranks.
    """

    specs: dict[str, ShardSpec] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)


def divided_cells(model: nn.Cell, plan: tuple[Rule, ...]) -> Iterator[tuple[Rule, str, nn.Cell]]:
    """Yields each rule with the names and Cells that it matches."""
    cells = list(model.cells_and_names())
    # embeddings first: a tied head needs the new one
    for rule in sorted(plan, key=lambda rule: rule.kind == "head"):
        for name, cell in cells:
            if re.fullmatch(rule.pattern, name):
                yield rule, name, cell


def plan_specs(model: nn.Cell, plan: tuple[Rule, ...], mesh: Mesh) -> dict[str, ShardSpec]:
    """Returns the rank's part of each parameter that the plan divides. Needs no other process; names the parameters.

    Raises:
        UserError: a size cannot be divided by `mesh.tp`.
    """
    name_by_place(model)
    specs: dict[str, ShardSpec] = {}
    if mesh.tp == 1:
        return specs
    for rule, name, cell in divided_cells(model, plan):
        if rule.kind == "heads":
            for number, what in zip(head_numbers(cell), ("heads", "key and value heads"), strict=False):
                if number % mesh.tp:
                    raise UserError(
                        f"{name} has {number} {what}, which {mesh.tp} tensor-parallel processes cannot share; choose a "
                        "number that divides them"
                    )
        for parameter in own_parameters(cell):
            axis = AXES.get(rule.kind, {}).get(parameter.name.rsplit(".", 1)[-1])
            if axis is not None:
                spec = ShardSpec(axis=axis, index=mesh.tp_rank, count=mesh.tp, num_sections=rule.num_sections)
                spec.check(parameter.name, parameter.shape[axis])
                specs[parameter.name] = spec
    return specs


def apply_tensor_parallel(model: nn.Cell, plan: tuple[Rule, ...], mesh: Mesh) -> ParallelModel:
    """Replaces the Cells that the plan names by parallel ones; call it before weights are filled.

    Keeps the order and `requires_grad` of the parameters and names them after their first place in the model, even on
    one rank. Replaces a Cell wherever the model refers to it. Rules that match nothing are allowed: a model may lack a
    tower.

    Raises:
        UserError: a size cannot be divided by `mesh.tp`.
    """
    result = ParallelModel(plan_specs(model, plan, mesh))
    if mesh.tp == 1:
        return result
    for rule, _, cell in list(divided_cells(model, plan)):
        if rule.kind == "heads":
            divide_heads(cell, mesh)
        elif rule.kind == "partial":
            result.partial.update(parameter.name for parameter in own_parameters(cell))
        else:
            new = build_parallel_cell(cell, rule.kind, mesh)
            for before, after in zip(own_parameters(cell), own_parameters(new), strict=True):
                after.requires_grad = before.requires_grad
            replace_everywhere(model, cell, new)
    name_by_place(model)
    return result


def own_parameters(cell: nn.Cell) -> list[Parameter]:
    return list(cell.get_parameters(expand=False))


AXES = {
    "enter": {},
    "column": {"weight": 0, "bias": 0},
    "row": {"weight": 1},
    "vocabulary": {"weight": 0},
    "head": {"weight": 0, "bias": 0},
}
"""Axis along which each kind divides its parameters."""


def build_parallel_cell(cell: nn.Cell, kind: str, mesh: Mesh) -> nn.Cell:
    """The parallel Cell with the sizes of a plain one."""
    if isinstance(cell, TiedHead):
        return VocabParallelTiedHead(cell.embedding, mesh=mesh)
    if kind == "enter":
        norms = {RMSNorm: EnteringRMSNorm, LayerNorm: EnteringLayerNorm}
        return norms[type(cell)](cell.weight.shape[0], eps=norm_epsilon(cell), mesh=mesh, dtype=cell.weight.dtype)
    dtype = cell.product.dtype
    if kind == "vocabulary":
        return VocabParallelEmbedding(*cell.product.shape, mesh=mesh, dtype=dtype)
    linears = {"column": ColumnParallelLinear, "row": RowParallelLinear, "head": VocabParallelHead}
    return linears[kind](cell.in_features, cell.out_features, mesh=mesh, has_bias=cell.has_bias, dtype=dtype)


def norm_epsilon(norm: RMSNorm | LayerNorm) -> float:
    return norm.layer_norm.epsilon if isinstance(norm, LayerNorm) else norm.eps


def replace_everywhere(model: nn.Cell, old: nn.Cell, new: nn.Cell) -> None:
    """Puts `new` in place of `old` wherever a Cell of the model refers to it."""
    for _, parent in list(model.cells_and_names()):
        for attribute, child in list(parent.name_cells().items()):
            if child is old:
                setattr(parent, attribute, new)


def head_numbers(cell: nn.Cell) -> tuple[int, int] | tuple[()]:
    """Returns the numbers of query heads and of key and value heads of a Cell; nothing if it has none."""
    config = getattr(cell, "config", None)
    num_heads = getattr(cell, "num_heads", None) or getattr(config, "num_attention_heads", None)
    if num_heads is None:
        return ()
    num_kept = getattr(cell, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or num_heads
    return num_heads, num_kept


def divide_heads(cell: nn.Cell, mesh: Mesh) -> None:
    """Sets the number of heads to the rank's share, in the Cell and in a copy of its config."""
    if not (numbers := head_numbers(cell)):
        return
    num_heads, num_kept = (number // mesh.tp for number in numbers)
    if hasattr(cell, "num_heads"):
        cell.num_heads = num_heads
    if hasattr(cell, "num_key_value_heads"):
        cell.num_key_value_heads = num_kept
    if hasattr(getattr(cell, "config", None), "num_key_value_heads"):
        cell.config = dataclasses.replace(cell.config, num_attention_heads=num_heads, num_key_value_heads=num_kept)
