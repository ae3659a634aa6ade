"""The rule engine: reversible rules over tensor names, tables of them, and the plans that they make."""
