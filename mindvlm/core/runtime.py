"""Device, mode, dtype, seed and messages of MindSpore, all in one place."""

import os
import warnings
from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore._c_expression import MSContext

from mindvlm.core.errors import UserError

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
# The first 910 and the 310 lack the fused attention operator.
FUSED_ATTENTION_NPUS = ("ascend910b", "ascend910_93")
_attention = "eager"


@dataclass(kw_only=True)
class RuntimeConfig:
    """The runtime keys that every YAML has at its top level.

    Attributes:
        attention: "fused": one operator of the NPU; "eager": separate operators; "auto": fused wherever it can be.
    """

    device: Literal["auto", "cpu", "ascend"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "fused", "eager"] = "auto"
    quant: Literal["none"] = "none"
    seed: int = 0


def start(config: RuntimeConfig) -> "ms.dtype":
    """Sets device and mode for this process and returns the dtype to compute in.

    Raises:
        UserError: Ascend is asked for where there is none, the process already runs on another device, fused attention
            is asked for where there is none, or the seed is out of range.
    """
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config key 'seed' is {config.seed}; expected 0 to {2**32 - 1}")
    device = choose_device(config.device)
    set_device(device)
    set_mode(config.mode == "graph")
    set_attention(choose_attention(config.attention, device, npu_version(device)))
    ms.set_seed(config.seed)
    return compute_dtype(config.dtype, device)


def set_device(device: str) -> None:
    """Sets the device of the process. MindSpore takes it once: after the first kernel even the same one is refused."""
    try:
        ms.set_device(device, *card_of_rank_table(device))
    except RuntimeError as error:
        if ms.get_context("device_target") != device:
            raise UserError(f"device '{device}' cannot be used: {first_line(error)}; start a new process") from None


def card_of_rank_table(device: str) -> tuple[int, ...]:
    """The card in `DEVICE_ID`, for a process that was started with a rank table; `msrun` finds the cards itself.

    Raises:
        UserError: a rank table is set and `DEVICE_ID` is no number.
    """
    if device != "Ascend" or "RANK_TABLE_FILE" not in os.environ or "MS_ROLE" in os.environ:
        return ()
    card = os.environ.get("DEVICE_ID", "")
    if not card.isdecimal():
        raise UserError(
            f"RANK_TABLE_FILE is set but DEVICE_ID is {card!r}; set DEVICE_ID to the number of this process's card"
        )
    return (int(card),)


def set_mode(graph_mode: bool) -> None:
    """Puts MindSpore into graph or PyNative mode. The mode is one for the whole process, whatever models it holds."""
    mode = ms.GRAPH_MODE if graph_mode else ms.PYNATIVE_MODE
    if ms.get_context("mode") != mode:
        ms.set_context(mode=mode)


def wait_for_device() -> None:
    """Returns when everything that was started has run. Graphs on CPU have run when their call returns."""
    if ms.get_context("device_target") != "CPU":
        ms.runtime.synchronize()


def choose_device(name: str) -> str:
    """'Ascend' or 'CPU'; 'auto' takes Ascend where MindSpore finds one."""
    if name == "cpu":
        return "CPU"
    found = ms.device_context.ascend.is_available()
    if name == "ascend" and not found:
        raise UserError("device is 'ascend' but MindSpore finds no Ascend NPU here; set device: cpu or auto")
    return "Ascend" if found else "CPU"


def attention() -> str:
    """What `start` settled for models that are built from now on: "eager", "fused", or "auto": fused where dtype and
    head dimension allow it. "eager" before `start`."""
    return _attention


def set_attention(choice: str) -> None:
    """Sets what `attention` returns."""
    global _attention
    _attention = choice


def choose_attention(choice: str, device: str, npu: str) -> str:
    """The config's choice, or "eager" in place of "auto" where the device has no fused attention.

    Args:
        choice: "auto", "fused" or "eager".
        device: "Ascend" or "CPU".
        npu: the NPU's version, see `npu_version`.

    Raises:
        UserError: "fused" where there is none.
    """
    if choice == "eager" or (device == "Ascend" and npu in FUSED_ATTENTION_NPUS):
        return choice
    if choice == "fused":
        place = f"the NPU is an {npu}" if device == "Ascend" else f"the device is {device}"
        raise UserError(
            f"attention is 'fused' but {place}; it needs one of {', '.join(FUSED_ATTENTION_NPUS)}; "
            "set attention: auto or eager"
        )
    return "eager"


def npu_version(device: str) -> str:
    """MindSpore's name of the NPU generation, such as "ascend910b"; empty on CPU."""
    return MSContext.get_instance().get_ascend_soc_version() if device == "Ascend" else ""


def compute_dtype(name: str, device: str):
    """The dtype to compute in. The CPU backend has no bfloat16 kernels and its float16 is slower than float32."""
    if device == "CPU" and name != "float32":
        warnings.warn(f"dtype {name} is computed in float32 on CPU", stacklevel=3)
        return ms.float32
    return DTYPES[name]


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
