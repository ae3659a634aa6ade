"""What a TinyLLaVA is fed when its conversion is proved: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindvlm.convert.parity.inputs import pixel_size, prompt_ids, structured_pixels
from mindvlm.convert.reference.tinyllava_form import bench_form, num_image_tokens, num_tower_tokens
from mindvlm.convert.reference.tinyllava_layout import tower_sizes
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.names import KINDS
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

PARTS = {"vision_tower": "vision_config", "mm_projector": "vision_config", "language_model": "dialect"}
"""Parts of native names, and the key of a form that describes each. The learned row of pictures in tiles is in none:
the stages have one picture, uncut."""


def parity_form(config: Mapping[str, Any], model: str, names: Collection[str]) -> dict[str, Any]:
    """The config.json of a source, with its tower's under `vision_config`, in the form of `bench_form`.

    Args:
        model: a key of `mindvlm.weights.recognise.MODELS`.
        names: the native tensors. A SigLIP that was published alone may have its last layer or not.
    """
    form = bench_form(config, next(kind.dialect for kind in KINDS if kind.name == model))
    if "dialect" not in form:
        tower = form["vision_config"]
        last = tower_sizes({**tower, "keeps_last_layer": True})["num_hidden_layers"] - 1
        tower["keeps_last_layer"] = any(name.startswith(f"vision_tower.encoder.layers.{last}.") for name in names)
    return form


@dataclass(frozen=True)
class TinyLlavaScope:
    """The stages that a set of tensors allows: a model may be there in parts.

    Attributes:
        tower, connector, language_model: the part of that name is there.
        images: everything that turns a picture into embeddings.
    """

    tower: bool
    connector: bool
    language_model: bool
    images: bool

    @classmethod
    def of(cls, names: Collection[str], form: Mapping[str, Any]) -> TinyLlavaScope:
        """From native names.

        Raises:
            UserError: there is a part that the config does not describe.
        """
        parts = {name.partition(".")[0] for name in names} & PARTS.keys()
        for part in sorted(parts):
            if PARTS[part] not in form:
                raise UserError(
                    f"--verify logits: the config.json beside the weights does not describe their {part}; put that of "
                    "the whole model there"
                )
        tower, connector = "vision_tower" in parts, "mm_projector" in parts
        has_connector = connector or form.get("mm_projector_type") == "identity"
        return cls(
            tower=tower,
            connector=connector,
            language_model="language_model" in parts,
            images=tower and has_connector and "dialect" in form,
        )


@dataclass(frozen=True)
class TinyLlavaInputs:
    """Inputs of one run, each made as far as the form describes the part; None where it does not.

    Attributes:
        pixels: (1, 3, height, width) float32, normalised.
        features: (1, T, width) float32 as of the tower, for a connector without one.
        input_ids: (1, L) int32.
    """

    pixels: np.ndarray | None
    features: np.ndarray | None
    input_ids: np.ndarray | None


def tinyllava_inputs(form: Mapping[str, Any], seed: int, *, image: bool) -> TinyLlavaInputs:
    """Make the inputs; `image` puts one picture's placeholders into the prompt."""
    generator = np.random.default_rng(seed)
    pixels = features = input_ids = None
    if "vision_config" in form:
        sizes = tower_sizes(form["vision_config"])
        pixels = structured_pixels(generator, *pixel_size(sizes))
        shape = (1, num_tower_tokens(form), sizes["hidden_size"])
        features = generator.standard_normal(shape, dtype=np.float32)
    if "dialect" in form:
        span = [PLACEHOLDER_ID] * num_image_tokens(form) if image else ()
        input_ids = prompt_ids(generator, form["vocab_size"], span=span)
    return TinyLlavaInputs(pixels, features, input_ids)
