"""The teacher of a distillation: read in either form, built beside the student, and trained with.

B rows, L codes of a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import TensorSource
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext
from mindvlm.models.delvm.checkpoint_config import from_published, read_published
from mindvlm.models.delvm.config import DelvmConfig
from mindvlm.models.delvm.distillation import DistillationConfig, DistillationLoss
from mindvlm.models.delvm.forms import hf_form
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.model_config import model_shapes
from mindvlm.models.loading import open_weights
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear import WeightCell
from mindvlm.nn.parameters import fill_parameters, freeze, name_by_place
from mindvlm.nn.products import Float16Product
from mindvlm.nn.rotary import decoder_frequencies

REMEDY = "give the folder of a decoder of DeLVM, in either form, or the YAML of one"


class TeacherStates(nn.Cell):
    """The states of a teacher, (B, L, hidden), without a gradient.

    Without its own `bprop`, PyNative mode would keep the activations of all layers.
    """

    def __init__(self, decoder: CausalLM):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.inv_freq = Tensor(decoder_frequencies(decoder.config))

    def construct(self, codes, segments):
        """codes (B, L) int32; segments are positions and segment ids, see `CausalLM`, or ()."""
        return self.decoder(self.decoder.embed_tokens(codes), self.inv_freq, *segments)

    def bprop(self, codes, segments, out, dout):
        zeros = ()
        for one in segments:
            zeros = zeros + (ops.zeros_like(one),)
        return ops.zeros_like(codes), zeros


class DistilledDecoder(nn.Cell):
    """Trains a decoder with the codes that follow and with the distribution that the teacher predicts for them.

    `construct` takes the arguments of `DelvmModel.construct` and returns both terms of the loss, (2,) float32, and
    the number of labels. The parameters of the teacher are named `teacher.*`; they are frozen.
    """

    loss_terms = ("loss_gt", "loss_kd")

    def __init__(self, student: DelvmModel, teacher: CausalLM, config: DistillationConfig):
        super().__init__(auto_prefix=False)
        self.student, self.teacher = student, TeacherStates(teacher)
        self.loss = DistillationLoss(config, student.language_model.lm_head, teacher.lm_head)

    def construct(self, codes, labels, inv_freq, positions=None, segment_ids=None):
        states = self.student.language_model(self.student.embed(codes), inv_freq, positions, segment_ids)
        known = self.teacher(codes, () if segment_ids is None else (positions, segment_ids))
        is_code = ops.ones_like(labels) if segment_ids is None else segment_ids >= 0
        return self.loss(
            states.reshape((-1, states.shape[-1])),
            known.reshape((-1, known.shape[-1])),
            labels.reshape((-1,)),
            is_code.astype(ms.float32).reshape((-1,)),
        )


def read_teacher(path: str, vocab_size: int) -> DelvmConfig:
    """Returns the run config of a teacher. Its VQGAN is left out if the decoder has its own table.

    Args:
        path: folder of a decoder in either form, or the YAML of one.
        vocab_size: number of codes of the student.

    Raises:
        UserError: there is no decoder of DeLVM, it has other codes, or it names no weights.
    """
    where, place = f"distillation.teacher {path}", Path(path)
    place = place.parent if place.name == "config.json" else place
    if not place.exists():
        raise UserError(f"{where}: no such file or folder; {REMEDY}")
    try:
        config = read_folder(place) if place.is_dir() else read_config(place)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    if not isinstance(config, DelvmConfig) or config.model.language_model is None:
        raise UserError(f"{where}: describes no decoder of DeLVM; {REMEDY}")
    if config.checkpoint is None:
        raise UserError(f"{where}: names no weights; set its key checkpoint")
    if (count := config.model.language_model.vocab_size) != vocab_size:
        raise UserError(f"{where}: has {count} codes but the student {vocab_size}; give a teacher with the same codes")
    if config.model.input_embedding == "table":
        config.model.vqgan = config.vqgan = None
    return config


def read_folder(folder: Path) -> DelvmConfig | None:
    """Returns the run config of a folder, with or without a VQGAN; None if it does not describe a DeLVM."""
    data = read_published(folder)
    if data is None:
        return None
    return DelvmConfig(checkpoint=str(folder), model=from_published(data, path=f"{folder}/config.json"))


def teacher_weights(run_config: DelvmConfig, sections: Mapping[str, Any]) -> dict[str, str]:
    """Returns the weights of the teacher, if the job has one; see `OwnTraining`."""
    section = sections.get("distillation")
    return {"distillation.teacher": teacher_of(section, run_config).checkpoint} if section else {}


def add_teacher(
    model: DelvmModel, run_config: DelvmConfig, sections: Mapping[str, Any], context: BuildContext
) -> nn.Cell:
    """Returns the Cell that a job trains: the model, with its teacher if the job has one."""
    section = sections.get("distillation")
    if section is None:
        return model
    teacher = build_teacher(teacher_of(section, run_config), context, origin=section.teacher)
    return DistilledDecoder(model, teacher, section)


def teacher_of(section: DistillationConfig, run_config: DelvmConfig) -> DelvmConfig:
    """See `read_teacher`. Raises UserError also if the job trains no decoder."""
    decoder = run_config.model.language_model
    if decoder is None:
        raise UserError("distillation: the model has no decoder that could learn from a teacher; remove the section")
    return read_teacher(section.teacher, decoder.vocab_size)


def build_teacher(config: DelvmConfig, context: BuildContext, *, origin: str) -> CausalLM:
    """Returns the decoder of a teacher with its weights, frozen and in inference mode, with a table of its own.

    Weight matrices that are stored in float16 stay in float16 if the computation is in float32.

    Args:
        config: see `read_teacher`.
        context: dtype and attention.
        origin: name of the config in messages.

    Raises:
        UserError: the weights cannot be used.
    """
    teacher = CausalLM(config.model.language_model, context)
    weights = open_weights(config, get_family(config.family), model_shapes(config.model), origin=origin, cache=False)
    with weights as source:
        table = hf_form(source, ()).source
        keep_float16(teacher, table)
        fill_parameters(teacher, table, prefix="language_model.")
    freeze(teacher)
    teacher.update_parameters_name("teacher.")
    return teacher.set_train(False)


def keep_float16(teacher: CausalLM, source: TensorSource) -> None:
    """Stores the weight matrices in float16 that are stored so in a source."""
    if teacher.dtype == ms.float32:
        for name, cell in list(teacher.cells_and_names()):
            if isinstance(cell, WeightCell) and source.infos[f"language_model.{name}.weight"].dtype == "float16":
                cell.set_product(Float16Product(cell.product.shape, ms.float32))
    name_by_place(teacher)
