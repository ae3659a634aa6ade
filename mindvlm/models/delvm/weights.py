"""Opens the weights of a DeLVM with a separate VQGAN."""

from collections.abc import Mapping

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.names import MODELS, VQGAN_PART
from mindvlm.weights.recognise import native_model, native_view
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.planning import make_plan


def view_with_parts(
    source: TensorSource, *, target_infos: Mapping[str, TensorInfo] | None = None, vqgan: TensorSource | None = None
) -> TensorSource:
    """Returns the tensors of a DeLVM under native names.

    Args:
        source: the checkpoint.
        target_infos: the tensors of the model.
        vqgan: a checkpoint of the VQGAN; it replaces that of `source`.

    Raises:
        ConversionError: the tensors do not match the model.
        UserError: there is no VQGAN, or `native_view` raises it.
    """
    wanted = target_infos or {}
    if vqgan is None:
        needs = any(name.startswith(f"{VQGAN_PART}.") for name in wanted)
        if needs and not any("quantize." in name for name in source.infos):
            raise UserError(f"{source.path}: holds no VQGAN; give the folder of its weights as vqgan (--vqgan)")
        return native_view(source, MODELS, target_infos=target_infos)
    lower = native_view(source, MODELS, target_infos=target_infos, partial=True)
    upper = native_view(vqgan, MODELS, target_infos=target_infos, partial=True)
    names = [name for name in upper.infos if name.startswith(f"{VQGAN_PART}.")]
    rest = [name for name in lower.infos if not name.startswith(f"{VQGAN_PART}.")]
    parts = [(str(source.path), SelectedSource(lower, rest)), (str(vqgan.path), SelectedSource(upper, names))]
    whole = OverlaidSource(parts)
    origin = f"{source.path} with {vqgan.path}"
    return make_plan(native_model(wanted, MODELS).native, whole.infos, target_infos, origin=origin).view(whole)
