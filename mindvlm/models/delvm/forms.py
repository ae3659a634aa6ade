"""The two forms of the decoder's input, computed from each other.

Training form: the row of a code in the codebook C (V, E) of the VQGAN through a projection P (hidden, E). Hugging Face
form: a table C P^T (V, hidden), without the VQGAN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mindvlm.checkpoint import MemorySource, RawTensor, TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.checkpoint_config import VQGAN_CLASS, from_published, hf_keys, training_keys, vqgan_keys
from mindvlm.models.delvm.model_config import vqgan_shapes
from mindvlm.weights.recognise import Formed
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource

TABLE = "language_model.embed_tokens.weight"
PROJECTION = "language_model.embed_tokens.projection.weight"
CODEBOOK = "vqgan.quantize.embedding.weight"
MAX_RESIDUAL = 1e-2
"""The relative residual of a table that was rounded to float16 or bfloat16 is below this."""


def hf_form(source: TensorSource, configs: Sequence[Mapping[str, Any]]) -> Formed:
    """Returns the Hugging Face form of native tensors: with the table, without the VQGAN beside a decoder.

    Raises:
        UserError: the codebook is missing.
    """
    decoder = [name for name in source.infos if not name.startswith("vqgan.") and name != PROJECTION]
    if not decoder or PROJECTION not in source.infos:
        return Formed(SelectedSource(source, decoder) if decoder else source)
    projection = source.read(PROJECTION)
    table = source_codebook(source) @ projection.to_float32().T
    made = RawTensor("float32", table.shape, table).cast(projection.dtype)
    files = {}
    if configs and "model" in configs[0]:
        files["config.json"] = as_json(hf_keys(from_published(configs[0])))
    note = "token embeddings: the codebook times the projection; the VQGAN is left out"
    return Formed(with_tensor(source, decoder, TABLE, made), {TABLE: (PROJECTION, CODEBOOK)}, note, files=files)


def training_form(source: TensorSource, configs: Sequence[Mapping[str, Any]]) -> Formed:
    """Returns the training form of native tensors: with the projection that explains the table best.

    Raises:
        UserError: the codebook is missing or does not explain the table, or a config.json describes another VQGAN.
    """
    if TABLE not in source.infos:
        if PROJECTION not in source.infos:
            raise UserError(f"{source.path}: has no token embeddings; give the weights of a whole decoder")
        return Formed(source)
    table, codebook = source.read(TABLE), source_codebook(source).astype(np.float64)
    wanted = table.to_float32().astype(np.float64)
    if len(codebook) != len(wanted):
        raise UserError(
            f"{source.path}: the decoder has {len(wanted)} codes but the VQGAN {len(codebook)}; give the VQGAN that "
            "the decoder was trained with"
        )
    projection = np.linalg.pinv(codebook) @ wanted
    residual = float(np.linalg.norm(codebook @ projection - wanted) / (np.linalg.norm(wanted) or 1.0))
    if residual > MAX_RESIDUAL:
        raise UserError(
            f"{source.path}: the codebook of the VQGAN does not explain the token embeddings (relative residual "
            f"{residual:.1e}, allowed {MAX_RESIDUAL:.0e}); give the VQGAN that the decoder was trained with"
        )
    values = np.ascontiguousarray(projection.T.astype(np.float32))
    made = RawTensor("float32", values.shape, values).cast(table.dtype)
    kept = [name for name in source.infos if name != TABLE]
    note = f"embedding projection: by the pseudo-inverse of the codebook, relative residual {residual:.1e}"
    files = {}
    decoder = next((config for config in configs if config.get("_class_name") != VQGAN_CLASS), None)
    if decoder is not None:
        tensors = {name.removeprefix("vqgan."): source.infos[name] for name in kept if name.startswith("vqgan.")}
        described = next((config for config in configs if config.get("_class_name") == VQGAN_CLASS), None)
        vqgan = vqgan_keys(tensors, str(source.path)) if described is None else described_vqgan(described, tensors)
        files["config.json"] = as_json(training_keys(from_published(decoder), vqgan))
    made = with_tensor(source, kept, PROJECTION, made)
    return Formed(made, {PROJECTION: (TABLE, CODEBOOK)}, note, residual, files)


def described_vqgan(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Returns the config of a VQGAN from its config.json, which also has what the tensors do not tell."""
    vqgan = from_published(config).vqgan
    if vqgan_shapes(vqgan, "") != {name: info.shape for name, info in infos.items()}:
        raise UserError(
            "the config.json of the VQGAN describes other tensors than its weights; correct it or remove it"
        )
    return asdict(vqgan)


def as_json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def source_codebook(source: TensorSource) -> np.ndarray:
    """Returns the codebook (V, E) float32. Raises UserError if the VQGAN is missing."""
    if CODEBOOK not in source.infos:
        raise UserError(
            f"{source.path}: the VQGAN is missing, whose codebook connects the forms of the token embeddings; give its "
            "folder as a further source, and leave --only out"
        )
    return source.read(CODEBOOK).to_float32()


def with_tensor(source: TensorSource, kept: list[str], name: str, tensor: RawTensor) -> TensorSource:
    """Returns some tensors of a source, and a computed one."""
    computed = MemorySource({name: tensor}, source.path)
    return OverlaidSource([(str(source.path), SelectedSource(source, kept)), (name, computed)])
