"""Activation statistics for `--quant`: which columns of each matrix matter, from the answers to some pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.nn.parameters import stored_tensors
from mindvlm.nn.products import WeightProduct
from mindvlm.processing.images.sources import IMAGE_ENDINGS
from mindvlm.sessions.vision_language_model import VisionLanguageModel

QUERY = "Provide the ocr results of this image."
NUM_TOKENS = 64
_LEAST = 1e-3
"""Smallest importance of a column, as a fraction of the mean: columns that no picture used are not ignored."""


def measure_importance(
    config_path: Path, sources: Sequence[Path], folder: Path, *, merge_lora: Path | None = None
) -> dict[str, np.ndarray]:
    """Returns the mean square of every input of every matrix, while the model answers a question about pictures.

    Args:
        config_path: YAML or folder of the model.
        sources: its weights; one file or folder.
        folder: the pictures.
        merge_lora: an adapter.

    Returns:
        native name -> (I,) float32 for each matrix that was multiplied.

    Raises:
        UserError: the model cannot be loaded or does not read pictures, or there are no pictures.
    """
    if len(sources) > 1:
        raise UserError("--calibrate runs one source; join the sources first, without --quant")
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not pictures:
        raise UserError(
            f"--calibrate {folder}: holds no pictures ({', '.join(sorted(IMAGE_ENDINGS))}); give a folder of some"
        )
    # without graphs, so that the inputs can be seen
    options = {"checkpoint": str(sources[0]), "mode": "pynative", "device": "cpu"}
    model = mindvlm.load(config_path, **options, **({"adapter": str(merge_lora)} if merge_lora else {}))
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"--calibrate asks about pictures, which {config_path} does not read; leave it out")
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    hooks = []

    def watch(name: str, product: WeightProduct) -> None:
        def add(_, inputs):
            rows = inputs[0].asnumpy().astype(np.float64)
            sums[name] = sums.get(name, 0) + (rows**2).sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        hooks.append(product.register_forward_pre_hook(add))

    for _, cell in list(model.model.cells_and_names()):
        if hasattr(cell, "native"):
            # operators of several matrices do not call each product
            cell.native = None
    model.engine.is_exact = False
    for name, target in stored_tensors(model.model).items():
        if isinstance(target, WeightProduct):
            watch(name, target)
    for picture in pictures:
        model.chat(QUERY, picture, max_new_tokens=NUM_TOKENS)
    for hook in hooks:
        hook.remove()
    return importance_of({name: total / counts[name] for name, total in sums.items()})


def importance_of(squares: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns mean squares (I,) as weights with the mean 1 and none near 0."""
    found = {}
    for name, values in squares.items():
        mean = values.mean()
        weights = np.maximum(values / mean, _LEAST) if mean > 0 else np.ones(len(values))
        found[name] = weights.astype(np.float32)
    return found
