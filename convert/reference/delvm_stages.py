"""The stages of a DeLVM on the torch side of the logits check."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.parity.delvm.inputs import DelvmInputs, DelvmScope, target_infos
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.reference.delvm import ReferenceDelvm, projection_of
from mindvlm.convert.reference.stages import Stages, fill, language_stages
from mindvlm.convert.reference.vqgan import ReferenceVqgan
from mindvlm.models.delvm.forms import CODEBOOK, PROJECTION, TABLE
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.weights.opened import Opened
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.planning import make_plan

logger = logging.getLogger(__name__)

SOURCE_TABLE, SOURCE_PROJECTION = "model.embed_tokens.weight", "model.embedding.embed_proj.weight"


class Parts(nn.Module):
    """The VQGAN and the decoder, those that are compared.

    Attributes:
        target: name and dtype of the input embedding in the target. Where the conversion computes it, it is computed
            here in another way, and rounded alike.
    """

    def __init__(self, config: DelvmModelConfig, request: ParityRequest) -> None:
        super().__init__()
        infos = target_infos(request.target)
        self.target = next(((name, infos[name].dtype) for name in (TABLE, PROJECTION) if name in infos), None)
        self.vqgan = ReferenceVqgan(config.vqgan) if config.vqgan else None
        training_form = config.input_embedding == "codebook"
        lm = config.language_model
        self.decoder = ReferenceDelvm(lm, training_form=training_form) if lm else None


def build(config: DelvmModelConfig, request: ParityRequest) -> Parts:
    return Parts(config, request).eval()


def source_tensors(opened: Opened) -> TensorSource:
    """Returns the decoder under the names of its form, and the VQGAN under native ones."""
    native, model = opened.source, opened.model
    table = model.forms["internlm"].table if PROJECTION in native.infos else model.hf
    vqgan = [name for name in native.infos if name.startswith("vqgan.")]
    decoder = SelectedSource(native, [name for name in native.infos if name not in vqgan])
    plan = make_plan(table.reverse(), decoder.infos, partial=True, origin=str(native.path))
    return OverlaidSource([("decoder", plan.view(decoder)), ("VQGAN", SelectedSource(native, vqgan))])


def fill_modules(parts: Parts, values: TensorSource, device: torch.device, scope: DelvmScope) -> None:
    """Streams the tensors into float32 modules in chunks. Raises UserError if one does not match the config."""
    parts.to_empty(device=device)
    for prefix, module in (("vqgan.", parts.vqgan), ("", parts.decoder)):
        for name, parameter in module.named_parameters() if module else ():
            if name != "model.wte.weight":
                fill(parameter, values, prefix + name)
    if parts.decoder:
        parts.decoder.model.wte.weight.copy_(input_rows(values, *parts.target))


def input_rows(values: TensorSource, target: str, dtype: str) -> Tensor:
    """Returns the row of each code, (V, hidden), as the form of the target gives it."""

    def read(name: str) -> Tensor:
        return torch.from_numpy(values.read(name).data.copy())

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(getattr(torch, dtype)).float()

    if SOURCE_TABLE in values.infos:
        table = read(SOURCE_TABLE)
        if target == TABLE:
            return table
        return read(CODEBOOK) @ rounded(projection_of(read(CODEBOOK), table)).T
    rows = (read(CODEBOOK).double() @ read(SOURCE_PROJECTION).double().T).float()
    return rounded(rows) if target == TABLE else rows


def compute(
    parts: Parts,
    config: DelvmModelConfig,
    inputs: DelvmInputs,
    scope: DelvmScope,
    num_tokens: int,
    device: torch.device,
) -> Stages:
    """Yields the stages of the parts that are there."""
    if scope.vqgan:
        logger.info("reference: VQGAN")
        yield "latent", parts.vqgan.latent(torch.from_numpy(inputs.pixels).to(device))
        yield "decoded", parts.vqgan.decode_codes(torch.from_numpy(inputs.codes).long().to(device))
    if scope.language_model:
        yield from language_stages(parts.decoder, torch.from_numpy(inputs.input_ids), None, num_tokens)
