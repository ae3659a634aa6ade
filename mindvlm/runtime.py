"""Device, mode, dtype, seed and messages of MindSpore, all in one place."""

import warnings
from dataclasses import dataclass
from typing import Literal

import mindspore as ms

from mindvlm.errors import UserError

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


@dataclass(kw_only=True)
class RuntimeConfig:
    """The runtime keys that every YAML has at its top level."""

    device: Literal["auto", "cpu", "ascend"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    quant: Literal["none"] = "none"
    seed: int = 0


def start(config: RuntimeConfig) -> "ms.dtype":
    """Sets device and mode for this process and returns the dtype to compute in.

    Raises:
        UserError: Ascend is asked for where there is none, the process already runs on another device, or the seed is
            out of range.
    """
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config key 'seed' is {config.seed}; expected 0 to {2**32 - 1}")
    device = choose_device(config.device)
    set_device(device)
    set_mode(config.mode == "graph")
    ms.set_seed(config.seed)
    return compute_dtype(config.dtype, device)


def set_device(device: str) -> None:
    """Sets the device of the process. MindSpore takes it once: after the first kernel even the same one is refused."""
    try:
        ms.set_device(device)
    except RuntimeError as error:
        if ms.get_context("device_target") != device:
            raise UserError(f"device '{device}' cannot be used: {first_line(error)}; start a new process") from None


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


def compute_dtype(name: str, device: str):
    """The dtype to compute in. The CPU backend has no bfloat16 kernels and its float16 is slower than float32."""
    if device == "CPU" and name != "float32":
        warnings.warn(f"dtype {name} is computed in float32 on CPU", stacklevel=3)
        return ms.float32
    return DTYPES[name]


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
