"""Writes single trained parts of a model in the files that other programs read."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import MemorySource, TensorSource, open_checkpoint, write_checkpoint
from mindvlm.weights.lora.saving import WEIGHTS_NAME
from mindvlm.weights.recognise import ConvertibleModel, native_model
from mindvlm.weights.rules.overlaid import SelectedSource
from mindvlm.weights.rules.planning import make_plan

TRAINED_WHOLE_FILE = "non_lora_trainables.bin"


def write_trained_parts(
    folder: Path,
    trained: Collection[str],
    *,
    models: Sequence[ConvertibleModel],
    files: Mapping[str, Sequence[str]],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Writes the files of single parts under published names, from the weights in a checkpoint folder.

    A run that trains only these parts gets a file for each. A run with adapters gets `non_lora_trainables.bin` with
    all that trained whole, which LLaVA's programs load with the adapter.

    Args:
        folder: folder of the trained weights.
        trained: native names of the trained parameters.
        models: the models of the family.
        files: name of a file -> prefixes of native names. Tensors with the first prefix are always in the file, those
            with another one only if they trained.
        dtypes: end of a published name -> dtype in which the original program stores it. A tensor whose values it
            cannot represent keeps its own.

    Raises:
        UserError: a file cannot be written.
    """
    adapter = folder / WEIGHTS_NAME
    if adapter.exists():
        with open_checkpoint(adapter) as checkpoint:
            whole = [name for name in checkpoint.infos if ".lora_" not in name]
            if whole:
                write_checkpoint(folder / TRAINED_WHOLE_FILE, SelectedSource(checkpoint, whole))
        return
    prefixes = tuple(prefix for group in files.values() for prefix in group)
    firsts = tuple(group[0] for group in files.values())
    if not all(name.startswith(prefixes) for name in trained) or not any(name.startswith(firsts) for name in trained):
        return
    with open_checkpoint(folder / "weights.safetensors") as checkpoint:
        table = native_model(checkpoint.infos, models).hf_tables_for(checkpoint.infos)[0].reverse()
        plan = make_plan(table, checkpoint.infos, origin=str(checkpoint.path))
        for file, (first, *others) in files.items():

            def belongs(name: str, first: str = first, others: tuple[str, ...] = tuple(others)) -> bool:
                return name.startswith(first) or (name.startswith(others) and name in trained)

            names = [name for name in plan.infos if all(map(belongs, plan.sources_of(name)))]
            write_checkpoint(folder / file, stored_as(plan.view(checkpoint), names, dtypes or {}))


def stored_as(source: TensorSource, names: Iterable[str], dtypes: Mapping[str, str]) -> MemorySource:
    """Returns the tensors of these names in the dtypes that represent their values; see `write_trained_parts`."""
    tensors = {}
    for name in names:
        raw = source.read(name)
        dtype = next((dtype for end, dtype in dtypes.items() if name.endswith(end)), raw.dtype)
        cast = raw.cast(dtype)
        tensors[name] = cast if np.array_equal(cast.to_float32(), raw.to_float32()) else raw
    return MemorySource(tensors)
