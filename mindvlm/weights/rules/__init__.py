"""The rule engine: reversible rules over tensor names, tables of them, and the plans that they make."""

from mindvlm.weights.rules.operations import Concat, Drop, Rename, Rule, ShapeConflict, Split, Tie, Untie
from mindvlm.weights.rules.patterns import Pattern
from mindvlm.weights.rules.table import Part, RuleTable, rename_all

__all__ = [
    "Concat",
    "Drop",
    "Part",
    "Pattern",
    "Rename",
    "Rule",
    "RuleTable",
    "ShapeConflict",
    "Split",
    "Tie",
    "Untie",
    "rename_all",
]
