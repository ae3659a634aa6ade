"""Cases of DeLVM's files: conversions of a training's checkpoint, and what it holds."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.conversion import ConversionRequest as Conversion
from mindvlm.convert.conversion import convert
from mindvlm.models.delvm.checkpoint_config import from_published, is_delvm, is_vit
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.names import MODELS, infos_of
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.delvm_loaded import load_model
from tests.golden_readers.delvm_steps import StepsReader
from tests.golden_readers.loaded import RecordingEngine
from tests.golden_readers.report import Report, relative_error


def is_conversion(case: Case) -> bool:
    return (case.folder / "hf_expected.safetensors").exists() and any(case.folder.glob("model_tp*_pp*"))


def read_conversion(case: Case, report: Report, mode: str) -> None:
    """Converts the shards to the Hugging Face form and back, and compares tensors and logits."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "training", Path(name) / "hf"
        source.mkdir()
        for file in (*case.folder.glob("model_tp*_pp*"), case.folder / "config.json"):
            shutil.copy(file, source)
        convert(Conversion(sources=(source,), target=target, to="hf", verify="tensors"))
        compare_files(case, report, target)
        vqgan, back = Path(name) / "vqgan", Path(name) / "back.safetensors"
        convert(Conversion(sources=(source,), target=vqgan, to="hf", only="vqgan"))
        recovered = convert(Conversion(sources=(target, vqgan), target=back, to="internlm"))
        compare_recovered(report, source, back, recovered.formed.residual)
        config = from_published(json.loads((target / "config.json").read_text()))
        # the script writes another GELU and another epsilon than those of the training
        config.language_model.hidden_act = case.documents["hf_config.json"]["hidden_act"]
        report.close("hf_logits_eps_train", logits_of(load_model(target, config), case.inputs["input_ids"], mode))
        config.language_model.rms_norm_eps = config.language_model.layer_norm_eps = 1e-6
        report.close("hf_logits", logits_of(load_model(target, config), case.inputs["input_ids"], mode))
        model = load_model(source, from_published(case.config))
        report.close("train_logits", logits_of(model, case.inputs["input_ids"], mode))


def compare_recovered(report: Report, source: Path, back: Path, residual: float) -> None:
    """Compares the training form that was recovered from the Hugging Face form with the original."""
    projection = "model.embedding.embed_proj.weight"
    with open_checkpoint(source) as expected, open_checkpoint(back) as found:
        report.same("names of the way back", [("all names", sorted(found.infos), sorted(expected.infos))])
        pairs = [
            (name, found.read(name).data.tobytes(), expected.read(name).data.tobytes())
            for name in expected.infos
            if name != projection and name in found.infos
        ]
        report.same("tensors of the way back", pairs)
        report.check("residual of the projection", residual, bound=1e-3, note="rounding of the table to float16")
        one, other = (file.read(projection).to_float32() for file in (found, expected))
        report.check("recovered projection", relative_error(one, other), bound=1e-2)


def logits_of(model: DelvmModel, ids: np.ndarray, mode: str) -> np.ndarray:
    engine = RecordingEngine(model, placeholder_id=-1, max_length=ids.shape[1] + 1, graph_mode=mode == "graph")
    return engine.logits(ids.astype(np.int32)).asnumpy()


def compare_files(case: Case, report: Report, target: Path) -> None:
    """Compares a converted folder with what the authors' script wrote."""
    written, recorded = json.loads((target / "config.json").read_text()), case.documents["hf_config.json"]
    # the computation of the training stays
    own = ("rms_norm_eps", "norm_eps", *(("hidden_act",) if is_vit(case.config) else ()))
    keys = [key for key in written if key in recorded and key not in own]
    report.same("config.json", [(key, written[key], recorded[key]) for key in keys])
    with open_checkpoint(target) as ours, open_checkpoint(case.folder / "hf_expected.safetensors") as theirs:
        names = [name for name in theirs.infos if not name.endswith("inv_freq")]
        report.same("names", [("all names", sorted(ours.infos), sorted(names))])
        pairs, embedding = [], "model.embed_tokens.weight"
        for name in names:
            if name != embedding and name in ours.infos:
                one, other = ours.read(name), theirs.read(name)
                pairs.append((name, (one.dtype, one.data.tobytes()), (other.dtype, other.data.tobytes())))
        report.same("tensors", pairs)
        one, other = ours.read(embedding).data, theirs.read(embedding).data
        steps = np.abs(one.view(np.int16).astype(np.int32) - other.view(np.int16).astype(np.int32)).max()
        report.check(embedding, float(steps), bound=1, note="steps of float16")


LAYOUT = "checkpoint_layout.json"


def is_checkpoint(case: Case) -> bool:
    return LAYOUT in case.documents and is_delvm(case.config)


def read_checkpoint(case: Case, report: Report, mode: str) -> None:
    """Compares the names and shapes in the file of a model with those that we write for its settings, and the values in
    the checkpoint with those of our training from the weights of the case."""
    layout = case.documents[LAYOUT]
    recorded = {name: text for name, text in layout["model_tp0_pp0.pt"].items() if name != "<type>"}
    config = from_published({**case.config, "model": layout["model_config.pt"]})
    table = MODELS[is_vit(case.config)].forms["internlm"].table
    ours = make_plan(table.reverse(), infos_of(config)).infos
    shown = {name: f"tensor {list(info.shape)} torch.{info.dtype}" for name, info in ours.items()}
    report.same("names in the model file", [("all names", sorted(shown), sorted(recorded))])
    report.same("shapes in the model file", [(name, shown.get(name), text) for name, text in recorded.items()])
    (num_steps,) = (int(name.partition(".")[0]) for name in layout if name.endswith(".step"))
    StepsReader(case, report).compare_saved(num_steps)
