"""Moves the tensors of a run between parameters and files, which always contain full tensors.

On a mesh every rank calls the same functions in the same order; the first rank reads and writes the files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindvlm.checkpoint import MemorySource, TensorInfo, TensorSource, open_checkpoint, write_safetensors
from mindvlm.checkpoint.dtypes import cast_storage, is_float
from mindvlm.checkpoint.source import RawTensor
from mindvlm.core.errors import UserError
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.sharding import ShardSpec, read_shard
from mindvlm.parallel.state import full_optimizer_state, join_parts, load_optimizer_state, to_array
from mindvlm.parallel.zero import ShardedAdamW
from mindvlm.training.run_checkpoints import OPTIMIZER_FILE, TRAINED_FILE, WEIGHTS_FILE
from mindvlm.weights.lora.saving import AdapterFiles

DTYPE_NAMES = {ms.float32: "float32", ms.float16: "float16", ms.bfloat16: "bfloat16", ms.int32: "int32"}


class ParameterSource(TensorSource):
    """A checkpoint source over parameters; copies one tensor at a time."""

    def __init__(self, parameters: Mapping[str, Parameter]):
        self.path = Path("<parameters>")
        self.parameters = parameters
        self.infos = {
            name: TensorInfo(name, DTYPE_NAMES[parameter.dtype], tuple(parameter.shape))
            for name, parameter in parameters.items()
        }
        self._cached: tuple[str, np.ndarray] | None = None

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != name:
            self._cached = (name, self._flat(name))
        return self._cached[1][start:stop]

    def _flat(self, name: str) -> np.ndarray:
        parameter = self.parameters[name]
        if parameter.dtype == ms.bfloat16:
            return cast_storage(parameter.astype(ms.float32).asnumpy().reshape(-1), "float32", "bfloat16")
        return parameter.asnumpy().reshape(-1)


def write_parameters(path: Path, parameters: Mapping[str, Parameter]) -> None:
    """Writes parameters in their own dtypes. Raises UserError if the file cannot be written."""
    write_safetensors(path, ParameterSource(parameters), metadata={"format": "pt"})


def read_parameters(
    path: Path, parameters: Mapping[str, Parameter], specs: Mapping[str, ShardSpec] | None = None
) -> None:
    """Fills the parameters from a file of full tensors.

    Args:
        specs: this rank's parts of divided parameters.

    Raises:
        UserError: the file is damaged, or contains other tensors.
    """
    specs = specs or {}
    with open_checkpoint(path) as checkpoint:
        require_shapes(path, checkpoint, {name: full_shape(name, p, specs) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            info = checkpoint.infos[name]
            part = read_shard(checkpoint, name, specs.get(name))
            raw = RawTensor(info.dtype, part.shape, part)
            parameter.set_data(to_tensor(raw.to_float32() if is_float(raw.dtype) else raw.data, parameter.dtype))


def full_shape(name: str, parameter: Parameter, specs: Mapping[str, ShardSpec]) -> tuple[int, ...]:
    """Returns the shape of the full tensor, of which this rank may have a part."""
    shape = tuple(parameter.shape)
    return specs[name].full_shape(shape) if name in specs else shape


def require_shapes(path: Path, source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the file contains exactly these tensors."""
    there = {name: tuple(info.shape) for name, info in source.infos.items()}
    if there != expected:
        differing = sorted(set(there.items()) ^ set(expected.items()))
        raise UserError(
            f"{path}: belongs to another model or optimizer ({len(differing)} tensors differ, such as "
            f"{differing[0][0]}); choose another output_dir"
        )


def moment_specs(names: Mapping[str, Parameter], specs: Mapping[str, ShardSpec]) -> dict[str, ShardSpec]:
    """Returns the parts of `moment1.<parameter>` and similar tensors, which are divided like the parameter."""
    return {name: specs[name.partition(".")[2]] for name in names if name.partition(".")[2] in specs}


def gathered(
    parameters: Mapping[str, Parameter], specs: Mapping[str, ShardSpec], host: HostGather
) -> Iterator[tuple[str, RawTensor]]:
    """Yields name and full tensor of each parameter, in its own dtype."""
    for name, parameter in parameters.items():
        dtype = DTYPE_NAMES[parameter.dtype]
        if name in specs:
            yield name, RawTensor.from_array(join_parts(name, to_array(parameter), specs, host)).cast(dtype)
        else:
            source = ParameterSource({name: parameter})
            yield name, source.read(name)


class RunTensors:
    """Weights and optimizer state of a run on any mesh.

    With an adapter, checkpoints contain the trained parameters under native names, and the adapter in PEFT's layout;
    the base is in no checkpoint.

    Args:
        weights: the model's parameters by native name.
        optimizer: other parameters of the step by name; `moment1.<parameter>` and similar ones are divided like the
            parameter.
        sharded: an optimizer whose state is divided over the replicas, if there is one.
        specs: this rank's parts of divided parameters.
        host: exchanges arrays with the other ranks.
        adapter: writer of the adapter, if the run trains one.
    """

    def __init__(
        self,
        weights: Mapping[str, Parameter],
        optimizer: Mapping[str, Parameter],
        *,
        sharded: ShardedAdamW | None = None,
        specs: Mapping[str, ShardSpec],
        host: HostGather,
        adapter: AdapterFiles | None = None,
    ):
        self.weights, self.optimizer, self.sharded, self.specs, self.host = weights, optimizer, sharded, specs, host
        self.adapter = adapter
        self.companions: dict[str, Parameter] = {}
        self.weights_file = WEIGHTS_FILE
        if adapter:
            self.weights_file = TRAINED_FILE
            self.weights = {name: parameter for name, parameter in weights.items() if parameter.requires_grad}
            self.companions = {name: weights[name] for name in adapter.needed if name not in self.weights}
        self.moment_specs = moment_specs(optimizer, specs)

    def write(self, folder: Path | None) -> None:
        """Writes all files; the first rank has the folder.

        If anything is divided, that rank keeps all full tensors of a file in memory until the file is written.
        """
        if self.adapter:
            self._write_adapter(folder)
        if folder is not None and not self.specs and self.sharded is None:
            write_parameters(folder / self.weights_file, self.weights)
            write_parameters(folder / OPTIMIZER_FILE, self.optimizer)
            return
        self._write(folder, self.weights_file, gathered(self.weights, self.specs, self.host))
        self._write(folder, OPTIMIZER_FILE, self._optimizer_tensors())

    def read(self, folder: Path) -> None:
        """Reads all tensors from files of any mesh. Raises UserError if they belong to another model or optimizer."""
        read_parameters(folder / self.weights_file, self.weights, self.specs)
        path = folder / OPTIMIZER_FILE
        if self.sharded is None:
            read_parameters(path, self.optimizer, self.moment_specs)
            return
        with open_checkpoint(path) as checkpoint:

            def read(name: str) -> np.ndarray:
                if name not in checkpoint.infos:
                    raise UserError(
                        f"{path}: has no {name}, it belongs to another optimizer; choose another output_dir"
                    )
                return checkpoint.read(name).to_float32()

            load_optimizer_state(self.sharded, dict(self.specs), self.host.mesh, read)
            for name, parameter in self.optimizer.items():
                parameter.set_data(to_tensor(read(name), parameter.dtype))

    def _write_adapter(self, folder: Path | None) -> None:
        held = dict(gathered(self.weights | self.companions, self.specs, self.host))
        if folder is not None:
            self.adapter.write(folder, held)

    def _optimizer_tensors(self) -> Iterator[tuple[str, RawTensor]]:
        yield from gathered(self.optimizer, self.moment_specs, self.host)
        if self.sharded is not None:
            for name, array in full_optimizer_state(self.sharded, dict(self.specs), self.host):
                yield name, RawTensor.from_array(array)

    def _write(self, folder: Path | None, name: str, tensors: Iterator[tuple[str, RawTensor]]) -> None:
        # ranks without a folder only take part in the gathering
        held = {key: raw for key, raw in tensors if folder is not None}
        if folder is not None:
            write_safetensors(folder / name, MemorySource(held), metadata={"format": "pt"})


def to_tensor(array: np.ndarray, dtype) -> Tensor:
    """Returns a Tensor with its own memory. 16-bit floats come as float32 arrays, which represent them exactly."""
    tensor = Tensor(np.array(array, copy=True))
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
