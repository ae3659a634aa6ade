"""The rule engine: reversible rules over tensor names, tables of them, and the plans that they make."""

from mindvlm.convert.rules.operations import Concat, Drop, Rename, Rule, ShapeConflict, Split, Tie, Untie
from mindvlm.convert.rules.patterns import Pattern
from mindvlm.convert.rules.table import Part, RuleTable, rename_all

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
