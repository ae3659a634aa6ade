"""The config.json beside the weights of a training, with which its folder is a model."""

import json
from dataclasses import asdict

from mindvlm.models.delvm.checkpoint_config import VQGAN_CLASS, from_published, hf_keys, training_keys
from mindvlm.models.delvm.config import DelvmConfig
from mindvlm.models.hf.export import require_described


def companions(config: DelvmConfig) -> dict[str, bytes]:
    """Returns name -> content of the file that describes the trained weights.

    Raises:
        UserError: no config.json can describe the model.
    """
    model = config.model
    vqgan = {"_class_name": VQGAN_CLASS, **asdict(model.vqgan)} if model.vqgan else {}
    if model.language_model is None:
        description = vqgan
    elif model.input_embedding == "codebook":
        description = training_keys(model, vqgan)
    else:
        description = hf_keys(model) | ({"vq_config": vqgan} if vqgan else {})
    parts = [part for part in ("language_model", "vqgan") if getattr(model, part)]
    require_described(model, description, read=from_published, parts=parts, others=unused_fields(config))
    return {"config.json": (json.dumps(description, indent=2) + "\n").encode()}


def unused_fields(config: DelvmConfig) -> list[str]:
    """Returns the fields of the model config that have no effect on it."""
    decoder = config.model.language_model
    if decoder is None:
        return ["max_length", "input_embedding"]
    unused = ["initializer_range", "layer_norm_eps" if decoder.norm == "rms_norm" else "rms_norm_eps"]
    unused += ["mlp_bias"] if decoder.mlp == "gated" else []
    unused += [] if decoder.use_dynamic_ntk or decoder.use_logn_attn else ["training_length"]
    return [f"language_model.{name}" for name in unused]
