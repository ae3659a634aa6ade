"""The state of a training run: one safetensors file, replaced as a whole."""

import json
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from mindvlm.checkpoint.files import open_checkpoint
from mindvlm.checkpoint.safetensors_format import write_safetensors
from mindvlm.checkpoint.source import MemorySource
from mindvlm.errors import UserError

STATE_FILE = "state.safetensors"


def save_state(folder: Path, parameters: dict[str, Parameter], progress: dict) -> None:
    """Writes parameters (weights and optimizer alike) and `progress` (anything JSON can hold) to the state file."""
    tensors = {name: np.asarray(parameter.asnumpy()) for name, parameter in parameters.items()}
    write_safetensors(folder / STATE_FILE, MemorySource(tensors), metadata={"progress": json.dumps(progress)})


def load_state(folder: Path, parameters: dict[str, Parameter]) -> dict | None:
    """Fills the parameters from the state file and returns its progress; None if there is no state.

    Raises:
        UserError: the file belongs to another model or optimizer.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    with open_checkpoint(path) as checkpoint:
        shapes = {name: tuple(info.shape) for name, info in checkpoint.infos.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if "progress" not in checkpoint.metadata:
            raise UserError(f"{path} is not the state of a training run; choose another output_dir")
        if shapes != expected:
            differing = sorted(set(shapes.items()) ^ set(expected.items()))
            raise UserError(
                f"{path} is the state of another model ({len(differing)} tensors differ, such as {differing[0][0]}); "
                "choose another output_dir"
            )
        for name, parameter in parameters.items():
            parameter.set_data(Tensor(checkpoint.read(name).data.copy()))
        return json.loads(checkpoint.metadata["progress"])


def save_weights(path: Path, parameters: dict[str, Parameter], dtype: str) -> None:
    """Writes weights alone, in `dtype`, as `mindvlm.load` reads them."""
    tensors = {name: np.asarray(parameter.asnumpy()).astype(dtype) for name, parameter in parameters.items()}
    write_safetensors(path, MemorySource(tensors), metadata={"format": "pt"})
