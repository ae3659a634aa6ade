"""Readers of the recorded cases (folders with inputs and outputs of an original program), one per kind of case.

`read_case` in kinds.py detects the kind and compares. A new family adds a module and a row in `KINDS`.
"""
