"""Proof by computation: the torch reference and the MindSpore model on the same inputs, stage by stage."""
