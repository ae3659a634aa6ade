"""Device, mode and seed of MindSpore, set only here."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import mindspore as ms
from mindspore._c_expression import MSContext, RuntimeConf, ms_ctx_param

from mindvlm.core.config import GenerationConfig, Scope
from mindvlm.core.errors import UserError
from mindvlm.core.host_cpus import num_threads
from mindvlm.core.weight_formats import parse_weights

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
# The first 910 and the 310 lack the fused attention operator.
FUSED_ATTENTION_NPUS = ("ascend910b", "ascend910_93")


@dataclass(kw_only=True)
class RuntimeConfig:
    """Runtime keys at the top level of every YAML.

    Attributes:
        attention: "fused": one NPU operator; "eager": separate operators; "auto": fused where possible.
    """

    device: Literal["auto", "cpu", "ascend"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "fused", "eager"] = "auto"
    seed: int = 0
    # `quant: none` never had an effect; existing files may contain it.
    RETIRED: ClassVar[dict[str, str]] = {"quant": "none"}


@dataclass(kw_only=True)
class RunConfig(RuntimeConfig):
    """Keys at the top level of the YAML of a model to ask. A family adds `family`, `model` and `processor`.

    Attributes:
        checkpoint: path of the weights.
        adapter: folder of a PEFT adapter to merge into the weights.
        weights: how weight matrices are stored on a CPU, see `mindvlm.core.weight_formats`.
        tensor_parallel: number of processes that share the weights; None for all processes of the job.
        scope: what the model is for; None for that of its family.
    """

    name: str
    checkpoint: str | None = None
    adapter: str | None = None
    weights: str = "auto"
    tensor_parallel: int | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    scope: Scope | None = None

    def __post_init__(self):
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise UserError(f"tensor_parallel is {self.tensor_parallel}; expected the number of processes, at least 1")
        parse_weights(self.weights)


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Settings for building Cells.

    Attributes:
        dtype: MindSpore dtype of parameters and activations.
        attention: "eager", "fused", or "auto": fused where dtype and head dimension allow it.
        linear: rules that replace dense weight products, see `mindvlm.nn.linear_plan`.
    """

    dtype: Any = ms.float32
    attention: Literal["auto", "fused", "eager"] = "eager"
    linear: tuple[Any, ...] = ()


EAGER_FLOAT32 = BuildContext()


def start(config: RuntimeConfig) -> BuildContext:
    """Sets device, mode and seed of this process and returns the context to build models in.

    Raises:
        UserError: Ascend or fused attention is not available, the process already uses another device, or the seed
            is out of range.
    """
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config key 'seed' is {config.seed}; expected 0 to {2**32 - 1}")
    device = choose_device(config.device)
    set_device(device)
    set_mode(config.mode == "graph")
    attention = choose_attention(config.attention, device, npu_version(device))
    ms.set_seed(config.seed)
    return BuildContext(dtype=compute_dtype(config.dtype, device), attention=attention)


def set_device(device: str) -> None:
    """Sets the device of the process. MindSpore accepts this once, before the first kernel runs."""
    try:
        ms.set_device(device, *card_of_rank_table(device))
    except RuntimeError as error:
        if ms.get_context("device_target") != device:
            raise UserError(f"device '{device}' cannot be used: {first_line(error)}; start a new process") from None
    if device == "CPU":
        # the threads of PyNative mode that hand kernels on to each other wait in busy loops
        ms.runtime.launch_blocking()
        limit_kernel_threads()


def limit_kernel_threads() -> None:
    """Gives MindSpore's kernels `num_threads()` threads. MindSpore accepts this once, before the first kernel runs.

    By default MindSpore starts a thread for each CPU of the machine, up to 25. Affinity, the quota of the container and
    `OMP_NUM_THREADS` are ignored, and threads without work wait in busy loops.
    """
    if num_threads() < (os.cpu_count() or 1) and not RuntimeConf.get_instance().is_op_threads_num_configured():
        ms.device_context.cpu.op_tuning.threads_num(num_threads())


def card_of_rank_table(device: str) -> tuple[int, ...]:
    """Returns the card in `DEVICE_ID` for a process started with a rank table; `msrun` assigns cards itself.

    Raises:
        UserError: a rank table is set but `DEVICE_ID` is not a number.
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
    """Sets graph or PyNative mode for the whole process."""
    mode = ms.GRAPH_MODE if graph_mode else ms.PYNATIVE_MODE
    if context(ms_ctx_param.mode) != mode:
        ms.set_context(mode=mode)


def current_device() -> str:
    """Returns the device of this process, 'CPU' or 'Ascend'."""
    return context(ms_ctx_param.device_target)


def context(setting: ms_ctx_param) -> Any:
    """Returns a setting of MindSpore as `ms.get_context` does, without its checks, which take 9 us."""
    return MSContext.get_instance().get_param(setting)


def wait_for_device() -> None:
    """Waits until the device is idle. On CPU, calls are synchronous."""
    if current_device() != "CPU":
        ms.runtime.synchronize()


def free_device_memory() -> int | None:
    """Returns the free bytes of the Ascend NPU in use; None if unknown."""
    try:
        properties = ms.hal.get_device_properties(0, "Ascend")
    except (RuntimeError, ValueError, TypeError):
        return None
    return getattr(properties, "free_memory", 0) or None


def choose_device(name: str) -> str:
    """Returns 'Ascend' or 'CPU'; 'auto' selects Ascend if MindSpore finds one.

    Raises:
        UserError: Ascend is selected but not found.
    """
    if name == "cpu":
        return "CPU"
    found = ms.device_context.ascend.is_available()
    if name == "ascend" and not found:
        raise UserError("device is 'ascend' but MindSpore finds no Ascend NPU here; set device: cpu or auto")
    return "Ascend" if found else "CPU"


def choose_attention(choice: str, device: str, npu: str) -> str:
    """Returns the config's choice, with "auto" replaced by "eager" on a device without fused attention.

    Args:
        choice: "auto", "fused" or "eager".
        device: "Ascend" or "CPU".
        npu: version of the NPU, see `npu_version`.

    Raises:
        UserError: the choice is "fused" on such a device.
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
    """Returns MindSpore's name of the NPU generation, such as "ascend910b"; empty on CPU."""
    return MSContext.get_instance().get_ascend_soc_version() if device == "Ascend" else ""


def compute_dtype(name: str, device: str):
    """Returns the compute dtype: float32 on CPU, which lacks bfloat16 kernels and is slower in float16."""
    if device == "CPU" and name != "float32":
        warnings.warn(f"dtype {name} is computed in float32 on CPU", stacklevel=3)
        return ms.float32
    return DTYPES[name]


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
