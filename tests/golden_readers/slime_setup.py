"""The training runs of the official SliME program without training: every flagged tensor is raised by one and saved.

The recipes in configs/slime run on a model of the recorded sizes. Each run starts from the files that ours left.
"""

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.hf.export import flat
from mindvlm.models.registry import get_family
from mindvlm.models.slime.export import PART_FILES, TRAINING_FIELDS
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import STATISTICS, infos_of
from mindvlm.models.slime.views import ViewsConfig
from mindvlm.parallel.mesh import Mesh
from mindvlm.training import building
from mindvlm.training.job_file import read_job
from mindvlm.training.run_tensors import ParameterSource, write_parameters
from mindvlm.training.trainable import untrainable
from mindvlm.weights.recognise import native_model
from mindvlm.weights.rules.planning import make_plan
from tests.golden_files import GOLDEN_ROOT
from tests.golden_readers.case import Case
from tests.golden_readers.report import Report
from tests.golden_readers.slime_text import SlimeTextReader

CONFIGS = Path(__file__).parents[2] / "configs" / "slime"
STYLES = {"PLAIN": "plain", "TWO": "colon_pair", "LLAMA_3": "chatml"}
SIZES = {"v1": "7b", "llama3": "8b"}
# what transformers notes about itself; where files are; the options of a run, without effect on the model
NOTES = (
    "architectures",
    "transformers_version",
    "pretraining_tp",
    "attention_bias",
    "attention_dropout",
    "rope_scaling",
)
NOTES += ("mm_vision_tower", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "mm_projector_lr")
HAND_OVER = re.compile(r"(projector|sampler)_(\w+)_to_(\w+)")
PLACEHOLDER, IGNORED = -200, -100


def is_setup(case: Case) -> bool:
    """Returns whether the case has the stages of training runs."""
    return bool(case.documents) and all("stages" in document for document in case.documents.values())


def run_of(flags: dict[str, str]) -> str:
    """Returns the recipe of the program's flags."""
    if "tune_mm_mlp_adapter" not in flags:
        return "3"
    return "2" if "use_local_only" in flags else {"0": "1a", "1": "1b"}[flags["mm_learnable_gated"]]


class SetupReader:
    """The runs of one decoder.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, report: Report, name: str, document: dict[str, Any], templates: Case, scratch: Path):
        self.report, self.name, self.stages, self.scratch = report, name, document["stages"], scratch
        self.hand_over = document["hand_over"]
        self.texts = SlimeTextReader(templates, report, scratch)
        self.vision = vision_config(self.stages)
        config = self.stages[0]["saved_config"]
        self.tokenizer = next(
            kind
            for kind in ("v1", "l3")
            if (found := self.texts.processor(kind, None, "plain").tokenizer).vocab_size == config["vocab_size"]
            and found.encode(",")[-1] == config["seperator"]
        )
        self.size = next(SIZES[stage["flags"]["version"]] for stage in self.stages if run_of(stage["flags"]) == "3")
        self.saved: dict[str, dict[str, np.ndarray]] = {}
        write_base(from_hf_config(config, vision_config=self.vision), scratch)

    def read(self) -> None:
        constant = {}
        for stage in self.stages:
            constant[stage["stage"]] = self.read_stage(stage)
        self.compare_hand_over(constant)

    def same(self, stage: str, item: str, pairs: list, note: str = "") -> None:
        self.report.same(f"{self.name} {stage} {item}", pairs, note)

    def job(self, stage: dict[str, Any]):
        """Returns the recipe with the recorded sizes, and its files where `read_stage` left them."""
        flags, path = stage["flags"], CONFIGS / f"train_{self.size}_{run_of(stage['flags'])}.yaml"
        described = from_hf_config(stage["saved_config"], vision_config=self.vision)
        sizes = asdict(described)
        model = {key: sizes[key] for key in ("language_model", "vision_tower", "separator_id", "num_local_tokens")}
        processor = self.texts.processor(self.tokenizer, None, "plain").config
        changes = {f"model.{key}": value for key, value in model.items()} | {
            "model.max_length": described.max_length,
            "processor.tokenizer": processor.tokenizer,
            "processor.vocab_size": described.language_model.vocab_size,
            "processor.views.size": self.vision["image_size"],
            "processor.views.num_global_tokens": described.num_global_tokens,
            "processor.views.num_local_tokens": described.num_local_tokens,
        }
        overrides = {f"model_changes.{key}": value for key, value in changes.items()}
        overrides |= {"device": "cpu", "dtype": "float32", "mode": "pynative"}
        if "mm_projector_lr" in flags:
            factor = float(flags["mm_projector_lr"]) / float(flags["learning_rate"])
            overrides["optimizer.learning_rate_factors"] = {r"^(mm_projector|sampler)\.": factor}
        config = read_job(path, overrides).config
        files = [Path(one) for one in config.init.weights[2:]]
        # slime_7b_1a/mm_projector.bin
        left = [self.scratch / file.parent.name.rpartition("_")[2] / file.name for file in files]
        config.init.weights = [str(self.scratch / "base.safetensors"), str(self.scratch / "tower.safetensors")]
        config.init.weights += map(str, left)
        return config, described

    def read_stage(self, stage: dict[str, Any]) -> set[str]:
        """Compares a run; returns the flagged tensors that get no gradient."""
        name, flags = stage["stage"], stage["flags"]
        config, described = self.job(stage)
        model_config = building.read_model(config)
        family = get_family("slime")
        ours, theirs = (
            flat(one, ("language_model", "vision_tower", "router"), TRAINING_FIELDS)
            for one in (model_config.model, described)
        )
        self.same(name, "model", [(key, value, theirs[key]) for key, value in ours.items()])
        model, _ = building.build_model(config, model_config, family, Mesh(), EAGER_FLOAT32, is_new=True)
        parameters = dict(model.parameters_and_names())
        native = ParameterSource(parameters).infos
        plan = make_plan(native_model(native, family.models).hf.reverse(), native)
        never = {plan.targets_of(one)[0] for one in untrainable(model)}
        trained = {plan.targets_of(parameter.name)[0] for parameter in model.trainable_params()}
        self.compare_trainable(stage, trained, never, {one: info.num_elements for one, info in plan.infos.items()})
        names = {one: plan.sources_of(one)[0] for one in plan.infos}
        self.compare_optimizer(stage, config.optimizer, names, trained)
        self.compare_options(stage, config, model_config)
        self.compare_sample(stage, model_config.processor)
        folder = self.scratch / run_of(flags)
        folder.mkdir(exist_ok=True)
        for parameter in model.trainable_params():
            parameter.set_data(parameter + 1)
        write_parameters(folder / "weights.safetensors", parameters)
        PART_FILES.write(folder, [parameter.name for parameter in model.trainable_params()], family.models)
        self.compare_saved(stage, folder)
        written = json.loads(family.companions(model_config)["config.json"])
        recorded = {key: value for key, value in stage["saved_config"].items() if key not in NOTES}
        self.same(name, "saved_config", [(key, written.get(key), value) for key, value in recorded.items()])
        return never & set(stage["trainable"])

    def compare_trainable(self, stage: dict, trained: set[str], never: set[str], numbers: dict[str, int]) -> None:
        """Compares what trains. The original also flags tensors without a gradient, which therefore never change."""
        flagged = set(stage["trainable"])
        names = sorted(trained | flagged)
        pairs = [(name, name in trained, name in flagged and name not in never) for name in names]
        total = sum(numbers[name] for name in trained | (flagged & never))
        pairs.append(("trainable_numel", total, stage["trainable_numel"]))
        self.same(stage["stage"], "trainable", pairs, f"{len(flagged & never)} flagged without a gradient")

    def compare_optimizer(self, stage: dict, optimizer, names: dict[str, str], trained: set[str]) -> None:
        """Compares the group of each tensor: those with decay come before those without it."""
        grouped = {name for group in stage["optimizer_groups"] for name in group["params"]}
        pairs = [("optimizer_class", "AdamW", stage["optimizer_class"])]
        pairs += [(name, "in no group", "in a group") for name in trained - grouped]
        for number, group in enumerate(stage["optimizer_groups"]):
            options = [optimizer.weight_decay, list(optimizer.betas), optimizer.eps]
            pairs.append((f"group {number}", options, [group[key] for key in ("weight_decay", "betas", "eps")]))
            for name in set(group["params"]) & trained:
                rate = optimizer.learning_rate * optimizer.learning_rate_factor(names[name])
                ours = (round(rate, 12), optimizer.decays(names[name]))
                pairs.append((name, ours, (group["lr"], number % 2 == 0)))
        self.same(stage["stage"], "optimizer_groups", pairs)

    def compare_options(self, stage: dict, config, model_config) -> None:
        flags, schedule = stage["flags"], config.schedule
        version, style = stage["template"].split("/")
        processor = get_family("slime").processor(model_config.processor)
        found = {
            "num_train_epochs": schedule.epochs,
            "warmup_ratio": schedule.warmup_ratio,
            "weight_decay": config.optimizer.weight_decay,
            "learning_rate": config.optimizer.learning_rate,
            "model_max_length": config.data.max_length,
        }
        pairs = [(key, value, float(flags[key])) for key, value in found.items()]
        pairs.append(("lr_scheduler_type", schedule.decay, flags["lr_scheduler_type"]))
        pairs.append(("template", processor.template.style, STYLES[style]))
        if version != "Unknown":
            pairs.append(("version", processor.template.name, version))
        pairs.append(("image_token_len", model_config.model.num_global_tokens, stage["image_token_len"]))
        # there is no cache in a training graph
        pairs.append(("use_cache_during_training", False, stage["use_cache_during_training"]))
        self.same(stage["stage"], "options", pairs)

    def compare_sample(self, stage: dict, config) -> None:
        """Compares ids, labels and views of the first sample, whose text follows from its ids."""
        processor, recorded = get_family("slime").processor(config), stage["first_sample"]
        ids, labels = recorded["input_ids"], recorded["labels"]
        template, decode = processor.template, processor.tokenizer.decode
        answer = decode([one for one in labels if one != IGNORED]).removesuffix(template.answer_separator)
        behind = decode(ids[ids.index(PLACEHOLDER) + 1 :])
        question = behind.split(template.separator + template.roles[1])[0] if template.style != "plain" else ""
        turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer.strip(" ")}]
        sample = processor.original_sample({"image": "a.png", "conversations": turns}, max_length=2048)
        crops, _ = ViewsConfig(size=config.views.size).crops(Image.new("RGB", tuple(recorded["image_size"])))
        shape = [1 + len(crops), 3, config.views.size, config.views.size]
        ours = np.where(sample.input_ids < 0, PLACEHOLDER, sample.input_ids).tolist()
        pairs = [("input_ids", ours, ids), ("labels", sample.labels.tolist(), labels)]
        self.same(stage["stage"], "first_sample", [*pairs, ("image_shape", shape, recorded["image_shape"])])

    def compare_saved(self, stage: dict, folder: Path) -> None:
        """Compares names, shapes and dtypes of the files that a run leaves."""
        saved = self.saved[stage["stage"]] = {}
        for file in PART_FILES.files:
            recorded = stage.get(f"saved_{file.removesuffix('.bin')}")
            written = {}
            if (folder / file).exists():
                with open_checkpoint(folder / file) as checkpoint:
                    written = {name: [list(i.shape), f"torch.{i.dtype}"] for name, i in checkpoint.infos.items()}
                    saved |= {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}
            names = sorted(written.keys() | (recorded or {}).keys())
            pairs = [(name, written.get(name), (recorded or {}).get(name)) for name in names]
            self.same(stage["stage"], f"saved {file}", [*pairs, ("exists", bool(written), bool(recorded))])
        if recorded := stage.get("saved_state_dict"):
            convert(
                ConversionRequest(
                    sources=(folder / "weights.safetensors",), target=folder / "saved.safetensors", to="hf"
                )
            )
            with open_checkpoint(folder / "saved.safetensors") as checkpoint:
                saved |= {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}
            shapes = {name: list(array.shape) for name, array in saved.items()}
            shapes |= {f"model.mm_projector.{name}": [1] for name in STATISTICS}
            pairs = [(name, shapes.get(name), recorded.get(name)) for name in sorted(shapes.keys() | recorded.keys())]
            self.same(stage["stage"], "saved_state_dict", pairs)

    def compare_hand_over(self, without_gradient: dict[str, set[str]]) -> None:
        """Compares the change of each tensor between two runs, with none for what has no gradient."""
        for key, recorded in self.hand_over.items():
            found = HAND_OVER.fullmatch(key)
            if not found:
                continue
            before, after = self.saved[found[2]], self.saved[found[3]]
            pairs = []
            for name, change in recorded.items():
                ours = float((after[name] - before[name]).mean(dtype=np.float64))
                expected = 0.0 if name in without_gradient[found[3]] else change
                pairs.append((name, round(ours, 3), expected))
            self.same("hand_over", key, pairs)
        mean = np.abs(self.saved["1a"]["model.sampler.post_qformer.query"]).mean()
        recorded = self.hand_over["fresh_resampler_query_mean_abs"]
        # both are means of random values
        self.report.check(f"{self.name} hand_over fresh query", abs(mean / recorded - 1), bound=0.1)


def vision_config(stages: list[dict]) -> dict[str, Any]:
    """Returns the config of the tower, from the shapes of its tensors; they leave the number of heads open."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    shapes = next(stage["saved_state_dict"] for stage in stages if "saved_state_dict" in stage)
    width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    rows, _ = shapes[f"{prefix}embeddings.position_embedding.weight"]
    layers = {name.split(".")[6] for name in shapes if name.startswith(f"{prefix}encoder.layers.")}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": 2,
        "image_size": round((rows - 1) ** 0.5) * patch,
        "patch_size": patch,
    }


def write_base(config, folder: Path) -> None:
    """Writes a random decoder and a random tower of these sizes."""
    rng = np.random.default_rng(0)
    for file, prefix in (("base", "language_model."), ("tower", "vision_tower.")):
        infos = {name: info for name, info in infos_of(config).items() if name.startswith(prefix)}
        arrays = {name: rng.normal(0, 0.1, info.shape).astype(np.float32) for name, info in infos.items()}
        write_checkpoint(folder / f"{file}.safetensors", MemorySource(arrays))


def read_setup(case: Case, report: Report) -> None:
    """Compares the runs of every decoder."""
    beside = case.folder.resolve().parent / "templates"
    templates = Case.open(beside if beside.exists() else GOLDEN_ROOT / "slime" / "templates")
    for name, document in case.documents.items():
        with tempfile.TemporaryDirectory() as scratch:
            SetupReader(report, name.removesuffix(".json"), document, templates, Path(scratch)).read()
