"""Cells that more than one family uses."""
