"""Training runs of the official TinyLLaVA program, from its initial checkpoints to its saved files.

Random draws of the program come from the record: the initial values of the connector and the permutations. Everything
else is a job of the production trainer.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.own_training import PassInputs, text_inputs
from mindvlm.models.registry import get_family
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.parallel.mesh import Mesh
from mindvlm.training import building
from mindvlm.training.datasets.config import make_collator, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker
from mindvlm.training.run_tensors import ParameterSource, write_parameters
from mindvlm.training.step_runner import StepRunner
from mindvlm.weights.recognise import native_model
from tests.golden_readers.case import Case
from tests.golden_readers.report import PIXEL_BOUND, TRAINING_BOUND, Report, relative_error
from tests.golden_readers.tinyllava_job import epochs_of, is_on, write_job

ARGUMENTS = "args.json"
PLACEHOLDER, IGNORED = -200, -100
# numbers that both sides compute in double precision
RATE_BOUND = 1e-9
OUTSIDE = "what the original notes about its own files and its own sensitivity"
# they have no part in what the model computes, or say where files are
OTHER_KEYS = ("mm_vision_tower", "bos_token_id", "eos_token_id")
NOT_COMPARED = ("saved_files", "sensitivity_max_loss_change", "sensitivity_max_weight_change")


def is_training_runs(case: Case) -> bool:
    """Returns whether the case has the arguments and the records of training runs."""
    runs = case.documents.get(ARGUMENTS, {})
    return bool(runs) and all(f"expected_{run}.json" in case.documents for run in runs)


class RunReader:
    """One run: batches, steps, groups and saved tensors."""

    def __init__(self, case: Case, report: Report, run: str, weights: list[Path], folder: Path):
        self.report, self.run, self.folder = report, run, folder
        self.arguments = case.documents[ARGUMENTS][run]
        self.expected = case.documents[f"expected_{run}.json"]
        self.only_connector = is_on(self.arguments, "tune_mm_mlp_adapter")
        self.records = json.loads((case.folder / self.arguments["data_path"]).read_text())
        config = self.config = write_job(case, self.arguments, weights, folder).config
        model_config = self.model_config = building.read_model(config)
        family = get_family(config.family)
        self.model, divided = building.build_model(config, model_config, family, Mesh(), EAGER_FLOAT32, is_new=True)
        decoder = model_config.model.language_model
        inv_freq = Tensor(inverse_frequencies(decoder.rotary_dim, decoder.rope_theta))
        self.runner = StepRunner(self.model, config, inv_freq=inv_freq, mesh=Mesh(), divided=divided)
        options = sample_options(config.data, lambda: family.processor(model_config.processor), seed=0, shuffle=False)
        self.maker = SampleMaker(options)
        self.collator = make_collator(config.data, self.maker.processor)
        self.num_image_tokens = model_config.processor.num_image_tokens
        parameters = dict(self.model.parameters_and_names())
        published = native_model(ParameterSource(parameters).infos, get_family(config.family).models).hf
        self.original = {name: published.sources_of(name)[0] for name in parameters}

    def read(self) -> None:
        """Compares all recorded values; changes the model's parameters."""
        self.compare_groups()
        self.compare_steps()
        self.compare_saved()
        self.compare_config()
        for name in NOT_COMPARED:
            self.report.skip(f"{self.run} {name}", OUTSIDE)

    def compare_groups(self) -> None:
        """Compares the trained parameters and their decay.

        The original also lists parameters that receive no gradient and therefore never change.
        """
        trained = [parameter.name for parameter in self.model.trainable_params()]
        cells = self.model.vision_tower.unused_cells()
        unused = {self.original[parameter.name] for cell in cells for parameter in cell.get_parameters()}
        ours, theirs = {self.original[name] for name in trained}, set(self.expected["trainable"]) - unused
        names = sorted(ours | theirs)
        self.report.same(f"{self.run} trainable", [(name, name in ours, name in theirs) for name in names])
        optimizer = self.config.optimizer
        decays = {self.original[name]: optimizer.weight_decay * optimizer.decays(name) for name in trained}
        groups = self.expected["groups"]
        recorded = {name: group["weight_decay"] for group in groups for name in group["params"] if name not in unused}
        names = sorted(decays.keys() | recorded.keys())
        self.report.same(f"{self.run} decay", [(name, decays.get(name), recorded.get(name)) for name in names])
        recorded = self.expected["defaults"]
        pairs = [("betas", optimizer.betas, recorded["betas"]), ("eps", optimizer.eps, recorded["eps"])]
        self.report.same(f"{self.run} betas and eps", pairs)

    def compare_steps(self) -> None:
        """Compares order, batches, losses, learning rates and norms."""
        epochs = epochs_of(self.arguments, self.records, self.expected["permutations"])
        size, per_step = self.config.data.batch_size, self.config.num_passes
        batches = [epoch[start : start + size] for epoch in epochs for start in range(0, len(epoch), size)]
        # the passes behind the last whole step of a run are not made
        batches = batches[: self.config.schedule.total_steps * per_step]
        micro = self.expected["micro"]
        names = [[str(self.records[number]["id"]) for number in batch] for batch in batches]
        pairs = [(f"batch {i}", ours, one["samples"]) for i, (ours, one) in enumerate(zip(names, micro, strict=True))]
        self.report.same(f"{self.run} order", pairs)
        schedule, losses, rates, norms, self.pairs, sums = self.config.schedule, [], [], [], [], []
        factors = self.group_factors()
        wanted = iter(zip(batches, micro, strict=True))
        for step in range(schedule.total_steps):
            passes = []
            for batch, recorded in islice(wanted, per_step):
                samples = [self.maker.make(number) for number in batch]
                passes.append(self.inputs(samples))
                self.compare_batch(len(losses) + len(passes), samples, recorded)
                sums.append((image_sums(samples), recorded["images_sum"]))
            rate = self.config.optimizer.learning_rate * schedule.factor(step)
            rates.append([rate * factor for factor in factors])
            found, norm = self.train_step(rate, passes)
            losses += found
            norms.append(norm)
        report, options = self.report, self.expected["opt"]
        report.same(f"{self.run} batches", self.pairs)
        ours, theirs = (np.concatenate(one) for one in zip(*sums, strict=True))
        report.check(f"{self.run} pixel sums", relative_error(ours, theirs), bound=PIXEL_BOUND)
        report.close(f"{self.run}.losses", np.array(losses, np.float32), bound=TRAINING_BOUND)
        recorded = np.array([option["lr"] for option in options])
        report.check(f"{self.run} learning rates", relative_error(np.array(rates), recorded), bound=RATE_BOUND)
        largest = self.config.optimizer.max_grad_norm
        for when, ours in (("before", np.array(norms)), ("after", np.minimum(norms, largest))):
            recorded = np.array([option[f"grad_norm_{when}_clip"] for option in options])
            error = relative_error(ours, recorded)
            report.check(f"{self.run} norms {when} clipping", error, bound=TRAINING_BOUND)

    def inputs(self, samples: list[Sample]) -> PassInputs:
        batch = self.collator(samples)
        pixels = tuple(batch.pixels.values())
        return text_inputs(batch.input_ids, batch.labels, batch.sources, pixels, batch.num_tokens, [])

    def train_step(self, rate: float, passes: list[PassInputs]) -> tuple[list[float], float]:
        """Runs one production step; returns the loss of each pass and the norm."""
        if len(passes) == 1:
            outcome = self.runner.run(rate, passes)
            return [outcome.loss], outcome.norm
        losses, total = [], self.runner.step.accumulate_graph.loss
        accumulate = self.runner.step.accumulate

        def recorded(*arguments):
            before = float(total.asnumpy())
            accumulate(*arguments)
            losses.append(float(total.asnumpy()) - before)

        self.runner.step.accumulate = recorded
        outcome = self.runner.run(rate, passes)
        self.runner.step.accumulate = accumulate
        return losses, outcome.norm

    def group_factors(self) -> list[float]:
        """Returns the learning rate factor of each recorded group; NaN for a group with several factors here."""
        factor, names = (
            self.config.optimizer.learning_rate_factor,
            {there: here for here, there in self.original.items()},
        )
        found = [{factor(names[name]) for name in group["params"]} for group in self.expected["groups"]]
        return [one.pop() if len(one) == 1 else float("nan") for one in found]

    def compare_batch(self, number: int, samples: list[Sample], recorded: dict) -> None:
        """Compares ids and labels of the rows, with one id per image, and their padding."""
        pad_id = self.maker.processor.tokenizer.pad_id
        longest = max(map(len, recorded["input_ids"]))
        for row, sample in enumerate(samples):
            ids, labels = self.collapsed(sample)
            room = longest - len(ids)
            whole = {
                "input_ids": ids + [pad_id] * room,
                "labels": labels + [IGNORED] * room,
                "attention_mask": [1] * len(ids) + [0] * room,
            }
            self.pairs += [(f"batch {number} row {row} {key}", ours, recorded[key][row]) for key, ours in whole.items()]

    def collapsed(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Returns ids and labels with one placeholder per image."""
        inside = np.zeros(len(sample.input_ids), bool)
        places = np.flatnonzero(sample.input_ids < 0)
        inside[[place for i, place in enumerate(places) if i % self.num_image_tokens]] = True
        ids = np.where(sample.input_ids < 0, PLACEHOLDER, sample.input_ids)
        return ids[~inside].tolist(), sample.labels[~inside].tolist()

    def compare_saved(self) -> None:
        """Compares the tensors converted from the trained weights: names, shapes, sums, values."""
        native = self.folder / "weights.safetensors"
        write_parameters(native, dict(self.model.parameters_and_names()))
        only = "projectors" if self.only_connector else None
        convert(ConversionRequest(sources=(native,), target=self.folder / "saved.safetensors", to="hf", only=only))
        with open_checkpoint(self.folder / "saved.safetensors") as checkpoint:
            arrays = {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}
        shapes, recorded = {name: list(array.shape) for name, array in arrays.items()}, self.expected["final_keys"]
        names = sorted(shapes.keys() | recorded.keys())
        self.report.same(f"{self.run} saved names", [(name, shapes.get(name), recorded.get(name)) for name in names])
        common = sorted(arrays.keys() & self.expected["final_sums"].keys())
        sums = [[array.sum(), np.abs(array).sum()] for array in (arrays[name].astype(np.float64) for name in common)]
        recorded = np.array([self.expected["final_sums"][name] for name in common])
        # beside the absolute sum: the values of a tensor may cancel out
        errors = np.abs(np.array(sums) - recorded).max(1) / np.maximum(recorded[:, 1], 1e-30)
        self.report.check(f"{self.run} saved sums", float(errors.max()), bound=TRAINING_BOUND)
        for name in self.report.recorded:
            if name.startswith(f"{self.run}.final."):
                tensor = name.removeprefix(f"{self.run}.final.")
                self.report.close(name, arrays[tensor], bound=TRAINING_BOUND)

    def compare_config(self) -> None:
        """Compares the keys of config.json that both programs write."""
        written = json.loads(get_family(self.config.family).companions(self.model_config)["config.json"])
        recorded = self.expected["saved_config"]
        # a run that saves its connector alone leaves the architecture of the language model there
        left_out = OTHER_KEYS + (("architectures",) if self.only_connector else ())
        common = [key for key in written if key in recorded and key not in left_out]
        self.report.same(f"{self.run} saved config", [(key, written[key], recorded[key]) for key in common])


def image_sums(samples: list[Sample]) -> np.ndarray:
    """Returns the pixel sum of each row, 0 without an image."""
    return np.array(
        [
            sum(float(view.image.sum(dtype=np.float64)) for one in sample.pictures for view in one.views)
            for sample in samples
        ]
    )


def read_training_runs(case: Case, report: Report) -> None:
    """Compares every run; later runs start from the connector that the first run trained."""
    root = case.folder.resolve()
    with tempfile.TemporaryDirectory() as name:
        first = Path(name) / "connector.safetensors"
        for run, arguments in case.documents[ARGUMENTS].items():
            start = {
                tensor.removeprefix(f"{run}.init."): array
                for tensor, array in case.outputs.items()
                if tensor.startswith(f"{run}.init.")
            }
            if start:
                write_checkpoint(first, MemorySource(start))
                for tensor in start:
                    report.skip(f"{run}.init.{tensor}", "an input")
            weights = [root / arguments["model_name_or_path"], root / arguments["vision_tower"], first]
            folder = Path(name) / run
            folder.mkdir()
            RunReader(case, report, run, weights, folder).read()
            if start:
                first = folder / "saved.safetensors"
