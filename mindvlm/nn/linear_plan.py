"""Rules that replace the dense weight products of a built model. Model files are independent of them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mindspore import nn

from mindvlm.nn.linear import WeightCell
from mindvlm.nn.parameters import name_by_place
from mindvlm.nn.products import WeightProduct


@dataclass(frozen=True)
class ProductRule:
    """Selects Cells by name and the product they get.

    Attributes:
        pattern: regular expression for the full dotted name of a Linear or Embedding.
        make: builds the product from the (shape, dtype) of the one it replaces, see `WeightProduct`.
    """

    pattern: str
    make: Callable[[tuple[int, int], object], WeightProduct]


def choose_products(model: nn.Cell, rules: Sequence[ProductRule]) -> None:
    """Replaces weight products by the first matching rule; where none matches, the dense product is kept.

    Call this after tensor-parallel sharding and before loading weights. Rules may match nothing, for example in a model
    without a tower.
    """
    # cells_and_names visits a shared Cell once, so an embedding and its tied head keep sharing one product
    for name, cell in list(model.cells_and_names()):
        if isinstance(cell, WeightCell):
            rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
            if rule:
                cell.set_product(rule.make(cell.product.shape, cell.product.dtype))
    name_by_place(model)
