"""The convertible models of all families, by name and by family."""

from mindvlm.models.registry import convertible_models

ALL = convertible_models()
MODELS = {model.name: model for model in ALL}
VARY = tuple(model for model in ALL if model.family == "vary")
TINYLLAVA = tuple(model for model in ALL if model.family == "tinyllava")
