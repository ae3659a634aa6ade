"""Readers of the recorded cases (folders with inputs and outputs of an original program), one per kind of case.

`read_case` (kinds.py) finds the kind and compares. A new family adds a module and its row in `KINDS`.
"""
