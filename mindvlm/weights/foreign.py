"""Checkpoints whose tensors are not plain weights: quantized weights, and the placeholders of ZeRO-3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.checkpoint.dtypes import is_float
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import find_block

_QUANTIZED = (
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format)", "bitsandbytes"),
    (r"\.(g_idx|B|workspace)", "GPTQ or Marlin"),
    (r"\.(qweight|qzeros)", "AWQ or GPTQ"),
    (r"\.weight_scales", "EETQ"),
    (r"\.weight_(packed|scale|scale_inv|zero_point)", "compressed-tensors or FP8"),
    (r"\._?weight[._:](qdata|scale|zero_point|int_data|tensor_impl.*)", "torchao"),
    (r"\.(codes|codebooks)", "AQLM"),
    (r"\.(W_q|weight\._data|weight\._scale|q_weight)", "HQQ, quanto or EXL2"),
)
"""End of the name of a tensor that only quantized weights have -> the program that writes it."""


def require_plain_weights(infos: Mapping[str, TensorInfo], origin: str) -> None:
    """Refuses quantized weights and tensors without values.

    Args:
        infos: the tensors.
        origin: name of the checkpoint in messages.

    Raises:
        UserError: the names or shapes show such tensors.
    """
    for pattern, program in _QUANTIZED:
        name = next((name for name in infos if re.search(f"{pattern}$", name)), None)
        if name:
            dequantize = ", or save model.dequantize() in transformers" if program == "bitsandbytes" else ""
            raise UserError(
                f"{origin}: weights quantized by {program} (tensor {name}); give the same model in float16, bfloat16 "
                f"or float32{dequantize}"
            )
    integer = next((i for n, i in infos.items() if n.endswith(".weight") and i.dtype in ("int8", "uint8")), None)
    if integer:
        raise UserError(
            f"{origin}: tensor {integer.name} is {integer.dtype}, as in quantized weights; give the same model in "
            "float16, bfloat16 or float32"
        )
    require_values(infos, origin)


def require_unquantized(infos: Mapping[str, TensorInfo], origin: str, *, merges: str | Path | None = None) -> None:
    """Refuses the files of `mindvlm-convert --quant`, which can only be run.

    Args:
        infos: the tensors.
        origin: name of the checkpoint in messages.
        merges: the adapter to merge into them, if that is the reason.

    Raises:
        UserError: a tensor is stored in blocks.
    """
    quantized = next((info for info in infos.values() if find_block(info.dtype)), None)
    if quantized:
        uses = f"take no adapter; merge {merges} while quantizing: mindvlm-convert --merge_lora {merges} --quant ..."
        if not merges:
            uses = "can be run but not converted or trained; give the weights that they were made from"
        raise UserError(
            f"{origin}: weights quantized by mindvlm-convert ({quantized.name} is {quantized.dtype}) {uses}"
        )


def require_values(infos: Mapping[str, TensorInfo], origin: str) -> None:
    """Refuses the placeholders of ZeRO-3, tensors without values; arguments and errors are as above."""
    empty = [name for name, info in infos.items() if info.shape == (0,) and is_float(info.dtype)]
    if empty:
        raise UserError(
            f"{origin}: {len(empty)} of {len(infos)} tensors have no values, the first is {empty[0]}; ZeRO-3 saved "
            "placeholders, run `python zero_to_fp32.py . whole.bin` in the folder of its checkpoint and give whole.bin"
        )
