"""Cells shared by the model families."""
