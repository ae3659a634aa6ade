"""The files of parts that TinyLLaVABench's programs look for beside a training, under the names that they give them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mindvlm.checkpoint import open_checkpoint, write_checkpoint
from mindvlm.models.tinyllava.part_names import FAMILY
from mindvlm.weights.recognise import native_model
from mindvlm.weights.rules.layered import SelectedSource

CONNECTOR_FILE, TRAINED_WHOLE_FILE = "mm_projector.bin", "non_lora_trainables.bin"
# what a run of the connector alone may train besides
_STAGE_ONE = ("mm_projector.", "image_newline", "language_model.embed_tokens.")


def write_trained_parts(folder: Path, trained: Collection[str]) -> None:
    """Write what other programs look for in the folder of a checkpoint, from the weights that lie there.

    A run of the connector alone gets `mm_projector.bin`, which `pretrain_mm_mlp_adapter` takes; a run with adapters
    `non_lora_trainables.bin`, with which their model is opened.

    Args:
        trained: native names of the parameters that train.

    Raises:
        UserError: a file cannot be written.
    """
    adapter = folder / "adapter_model.safetensors"
    if adapter.exists():
        with open_checkpoint(adapter) as checkpoint:
            whole = [name for name in checkpoint.infos if ".lora_" not in name]
            if whole:
                write_checkpoint(folder / TRAINED_WHOLE_FILE, SelectedSource(checkpoint, whole))
    elif any(name.startswith("mm_projector.") for name in trained) and all(n.startswith(_STAGE_ONE) for n in trained):
        with open_checkpoint(folder / "weights.safetensors") as checkpoint:
            table = native_model(checkpoint.infos, FAMILY).hf_tables_for(checkpoint.infos)[0].reverse()
            plan = table.plan(checkpoint.infos, origin=str(checkpoint.path))
            part = [name for name in plan.infos if set(plan.sources_of(name)) <= set(trained)]
            write_checkpoint(folder / CONNECTOR_FILE, SelectedSource(plan.view(checkpoint), part))
