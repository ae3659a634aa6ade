"""The files of single trained parts that other programs read."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import MemorySource, TensorSource, open_checkpoint, write_checkpoint
from mindvlm.weights.lora.saving import WEIGHTS_NAME
from mindvlm.weights.recognise import ConvertibleModel, native_model
from mindvlm.weights.rules.overlaid import SelectedSource
from mindvlm.weights.rules.planning import make_plan

TRAINED_WHOLE_FILE = "non_lora_trainables.bin"


@dataclass(frozen=True)
class PartFiles:
    """The files of a family's parts.

    Attributes:
        files: name of a file -> prefixes of native names. Tensors with the first prefix are always in the file, those
            with another one only if they trained.
        dtypes: end of a published name -> dtype in which the original program stores it. A tensor whose values it
            cannot represent keeps its own.
    """

    files: Mapping[str, Sequence[str]]
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def holding(self, names: Collection[str]) -> list[str]:
        """Returns the files that always hold some of these tensors."""
        return [file for file, (first, *_) in self.files.items() if any(name.startswith(first) for name in names)]

    def write(self, folder: Path, trained: Collection[str], models: Sequence[ConvertibleModel]) -> None:
        """Writes the files under published names, from the weights in a checkpoint folder.

        A run that trains only these parts gets all files. A run with adapters gets `non_lora_trainables.bin` with all
        that trained whole, which LLaVA's programs load with the adapter.

        Args:
            folder: folder of the trained weights.
            trained: native names of the trained parameters.
            models: the models of the family.

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
        prefixes = tuple(prefix for group in self.files.values() for prefix in group)
        if not self.holding(trained) or not all(name.startswith(prefixes) for name in trained):
            return
        with open_checkpoint(folder / "weights.safetensors") as checkpoint:
            table = native_model(checkpoint.infos, models).hf_tables_for(checkpoint.infos)[0].reverse()
            plan = make_plan(table, checkpoint.infos, origin=str(checkpoint.path))
            for file, (first, *others) in self.files.items():
                kept = {
                    name
                    for name in checkpoint.infos
                    if name.startswith(first) or (name in trained and name.startswith(tuple(others)))
                }
                names = [name for name in plan.infos if set(plan.sources_of(name)) <= kept]
                write_checkpoint(folder / file, self._stored(plan.view(checkpoint), names))

    def _stored(self, source: TensorSource, names: Iterable[str]) -> MemorySource:
        tensors = {}
        for name in names:
            raw = source.read(name)
            cast = raw.cast(next((dtype for end, dtype in self.dtypes.items() if name.endswith(end)), raw.dtype))
            tensors[name] = cast if np.array_equal(cast.to_float32(), raw.to_float32()) else raw
        return MemorySource(tensors)
