"""The kinds of cases and the reader of each kind.

A kind is detected from the files and arrays in the folder, never from the folder's name.
"""

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RuntimeConfig, start
from tests.golden_readers import (
    caption,
    delvm,
    delvm_distillation,
    delvm_files,
    delvm_packing,
    delvm_pictures,
    delvm_schedule,
    delvm_steps,
    kernels,
    language,
    preprocess,
    scorers,
    slime,
    slime_files,
    slime_setup,
    slime_text,
    text,
    tinyllava,
    tinyllava_connectors,
    tinyllava_folder,
    tinyllava_pictures,
    tinyllava_runs,
    tinyllava_text,
    towers,
)
from tests.golden_readers.case import Case, UnusableCase
from tests.golden_readers.report import Report


@dataclass(frozen=True)
class Kind:
    """One kind of case.

    Attributes:
        recognises: returns whether a case is of this kind; the first match reads the case.
        read: compares all recorded values; called with (case, report, mode).
    """

    name: str
    recognises: Callable[[Case], bool]
    read: Callable[[Case, Report, str], None]


def has_weights(case: Case) -> bool:
    return case.weights.exists()


def is_language(case: Case, *, config_key: str) -> bool:
    """Returns whether the case is a decoder, with or without towers; `config_key` identifies its dialect."""
    has_prompts = any(re.fullmatch(r"(gen_)?ids_\w+|(\w+_)?input_ids", name) for name in case.inputs)
    return has_weights(case) and has_prompts and config_key in case.config


def is_tower(case: Case, *, config_key: str, pixels: str) -> bool:
    return has_weights(case) and config_key in case.config and set(case.inputs) == {pixels}


def is_preprocess(case: Case) -> bool:
    return not has_weights(case) and any(
        preprocess.array_parts(name, path.stem) for path in case.pictures() for name in case.outputs
    )


def is_text(case: Case) -> bool:
    documents = case.documents.values()
    return not has_weights(case) and case.vocabulary() is not None and any(map(text.has_known_form, documents))


KINDS = (
    Kind("VQGAN", delvm_pictures.is_vqgan, delvm_pictures.read_vqgan_case),
    Kind(
        "DeLVM checkpoint",
        delvm_files.is_checkpoint,
        delvm_files.read_checkpoint,
    ),
    Kind("DeLVM steps", delvm_steps.is_steps, lambda case, report, mode: delvm_steps.read_steps(case, report)),
    Kind("DeLVM decoder", delvm.is_decoder, delvm.read_decoder_case),
    Kind("DeLVM conversion", delvm_files.is_conversion, delvm_files.read_conversion),
    Kind("DeLVM pictures", delvm_pictures.is_sequence, delvm_pictures.read_sequence),
    Kind("DeLVM demo", delvm_pictures.is_demo, delvm_pictures.read_demo),
    Kind(
        "DeLVM packing",
        delvm_packing.is_packing,
        lambda case, report, mode: delvm_packing.read_packing(case, report),
    ),
    Kind(
        "DeLVM schedules",
        delvm_schedule.is_schedules,
        lambda case, report, mode: delvm_schedule.read_schedules(case, report),
    ),
    Kind("DeLVM distillation", delvm_distillation.is_given_logits, delvm_distillation.read_given_logits),
    Kind("Vary-tiny", lambda case: is_language(case, config_key="ffn_dim"), language.read_language),
    Kind("Vary-tiny text", caption.is_caption_text, lambda case, report, mode: caption.read_caption_text(case, report)),
    Kind("language model", lambda case: is_language(case, config_key="rotary_emb_base"), language.read_language),
    Kind(
        "CLIP tower",
        lambda case: is_tower(case, config_key="vision_config", pixels="pixel_values_clip"),
        lambda case, report, mode: towers.read_clip(case, report),
    ),
    Kind(
        "vision vocabulary",
        lambda case: is_tower(case, config_key="vision_high_config", pixels="pixel_values_high"),
        lambda case, report, mode: towers.read_vocabulary(case, report),
    ),
    Kind("SliME pixels", slime_files.is_pixels, lambda case, report, mode: slime_files.read_pixels(case, report)),
    Kind(
        "image preprocessing",
        is_preprocess,
        lambda case, report, mode: preprocess.read_preprocess(case, report),
    ),
    Kind("TinyLLaVA", tinyllava.is_tinyllava, tinyllava.read_tinyllava),
    Kind("TinyLLaVA folder", tinyllava_folder.is_checkpoint_folder, tinyllava_folder.read_checkpoint_folder),
    Kind(
        "connectors",
        tinyllava_connectors.is_connectors,
        lambda case, report, mode: tinyllava_connectors.read_connectors(case, report),
    ),
    Kind(
        "TinyLLaVA text",
        tinyllava_text.is_tinyllava_text,
        lambda case, report, mode: tinyllava_text.read_tinyllava_text(case, report),
    ),
    Kind(
        "TinyLLaVA pictures",
        tinyllava_pictures.is_tinyllava_pictures,
        lambda case, report, mode: tinyllava_pictures.read_tinyllava_pictures(case, report),
    ),
    Kind(
        "TinyLLaVA training",
        tinyllava_runs.is_training_runs,
        lambda case, report, mode: tinyllava_runs.read_training_runs(case, report),
    ),
    Kind("SliME", slime.is_slime_case, slime.read_slime),
    Kind("SliME text", slime_text.is_slime_text, lambda case, report, mode: slime_text.read_slime_text(case, report)),
    Kind("SliME training", slime_setup.is_setup, lambda case, report, mode: slime_setup.read_setup(case, report)),
    Kind("SliME tiling", slime_files.is_tiling, lambda case, report, mode: slime_files.read_tiling(case, report)),
    Kind("SliME tables", slime_files.is_tables, lambda case, report, mode: slime_files.read_tables(case, report)),
    Kind("scored answers", scorers.is_scorers, lambda case, report, mode: scorers.read_scorers(case, report)),
    Kind("evaluation", scorers.is_evaluation, lambda case, report, mode: scorers.read_evaluation(case, report)),
    Kind("text", is_text, lambda case, report, mode: text.read_text(case, report)),
)


def read_case(folder: str | Path, mode: str, kernels_in_use: str = "off") -> Report:
    """Runs one folder and compares all recorded values.

    Args:
        kernels_in_use: see `kernels.check_choice`.

    Raises:
        UnusableCase: the folder does not exist, or its kind is unknown.
        UserError: these kernels cannot be used here.
    """
    begin = time.perf_counter()
    case = Case.open(folder)
    kind = next((kind for kind in KINDS if kind.recognises(case)), None)
    if kind is None:
        found = ", ".join(sorted(path.name for path in case.folder.iterdir())[:6]) or "nothing"
        raise UnusableCase(f"{case.folder}: the kind of case is not recognised (it has {found})")
    kernels.choose(kernels_in_use)
    start(RuntimeConfig(device="cpu", mode=mode))
    is_native = kernels_in_use != "off"
    run = f"{mode}, kernels in {kernels_in_use}" if is_native else mode
    report = Report(case.folder.resolve().name, kind.name, run, case.outputs)
    report.kernels = kernels_in_use
    try:
        kind.read(case, report, mode)
    except UserError as error:
        report.fail("production code", f"refused: {error}")
    except Exception as error:  # any exception is a failed comparison
        traceback.print_exc()
        report.fail("production code", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    report.skip_rest(kernels.NO_TRAINING if is_native else "no rule of this reader for an array of this name")
    report.seconds = time.perf_counter() - begin
    return report
