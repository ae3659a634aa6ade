"""A TinyLLaVA whose tower's weights lie in a repository of their own."""

from __future__ import annotations

from collections.abc import Mapping

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.part_names import FAMILY
from mindvlm.models.tinyllava.tower_folder import deleted_layer, in_tower
from mindvlm.weights.recognise import native_model, native_view
from mindvlm.weights.rules.layered import LayeredSource, SelectedSource

Infos = Mapping[str, TensorInfo]


def whole_view(
    source: TensorSource, *, target_infos: Infos | None = None, tower: TensorSource | None = None
) -> TensorSource:
    """Return the tensors of a TinyLLaVA under native names, see `native_view`.

    Args:
        source: the checkpoint.
        target_infos: the tensors of the model.
        tower: a checkpoint with a tower: of the tower's own repository, of a whole CLIP or SigLIP as openai and google
            publish them, or of a TinyLLaVA. Its tower is taken, whether `source` has one or not. Of SigLIP the layer
            behind the model's last one is left out, as TinyLLaVABench deletes it.

    Raises:
        ConversionError: the tensors do not make up the model.
        UserError: as of `native_view`; or there is no tower.
    """
    if tower is None:
        wants_tower = any(map(in_tower, target_infos or ()))
        if wants_tower and not any(map(in_tower, source.infos)):
            raise UserError(
                f"{source.path}: holds no vision tower; give the folder of the tower's weights as vision_tower"
            )
        return native_view(source, target_infos=target_infos, family=FAMILY)
    if target_infos is None:
        raise ValueError("a tower of its own needs target_infos")
    rest = SelectedSource(source, [name for name in source.infos if not in_tower(name)])
    lower = native_view(rest, target_infos=target_infos, family=FAMILY, partial=True)
    layers = [(str(source.path), lower), (str(tower.path), _tower_of(tower, target_infos))]
    whole = LayeredSource(layers)
    table = native_model(target_infos, FAMILY).native
    return table.plan(whole.infos, target_infos, origin=f"{source.path} with {tower.path}").view(whole)


def _tower_of(source: TensorSource, target_infos: Infos) -> TensorSource:
    """The tensors of the tower in a checkpoint, but for the layer that TinyLLaVABench deletes."""
    native = native_view(source, family=FAMILY, left_out=deleted_layer(target_infos))
    names = [name for name in native.infos if in_tower(name)]
    if not names:
        raise UserError(f"{source.path}: holds no vision tower; give the folder of one as vision_tower")
    return SelectedSource(native, names)
