"""Opens the weights of a SliME whose files lack the fixed positions, as those of trained tensors do."""

from collections.abc import Mapping

from mindvlm.checkpoint import MemorySource, TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.models.hf.tower_folder import in_connector, view_with_tower
from mindvlm.models.slime.names import MODELS
from mindvlm.models.slime.positions import fixed_positions
from mindvlm.weights.rules.overlaid import OverlaidSource

POSITIONS = {
    "mm_projector.attn.pos_embed": ("mm_projector.attn.pos_embed",),
    "sampler.pos_embed": ("sampler.pos_embed", "sampler.post_qformer.pos_embed"),
}
"""Native names of the fixed positions -> endings of their names in any naming."""


def view_with_parts(
    source: TensorSource, *, target_infos: Mapping[str, TensorInfo] | None = None, **parts: TensorSource
) -> TensorSource:
    """Returns the tensors of a SliME under native names. Absent positions are computed.

    Args:
        source: the checkpoint.
        target_infos: the tensors of the model.
        parts: see `view_with_tower`.

    Raises:
        ConversionError: the tensors do not match the model.
        UserError: a part is missing.
    """
    wanted = dict(target_infos or {})
    has_compression = any("sampler." in name for name in source.infos)
    if any(map(in_connector, source.infos)) and "sampler.query" in wanted and not has_compression:
        raise UserError(
            f"{source.path}: holds no local compression; join it with the sampler.bin of the same stage: "
            f"mindvlm-convert --torch_ckpt_path {source.path} sampler.bin --mindspore_ckpt_path "
            f"{source.path.with_name('model.safetensors')}"
        )
    absent = {
        name: wanted.pop(name)
        for name, endings in POSITIONS.items()
        if name in wanted and not any(found.endswith(endings) for found in source.infos)
    }
    view = view_with_tower(source, MODELS, target_infos=wanted or target_infos, **parts)
    computed = MemorySource({name: fixed_positions(info.shape) for name, info in absent.items()})
    return OverlaidSource([(str(source.path), view), ("positions", computed)]) if absent else view
