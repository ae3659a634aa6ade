"""Scorers of single answers, as pure functions of texts. Each reproduces the official program of its benchmark."""
