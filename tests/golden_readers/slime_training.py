"""Training batches and steps of a SliME case, by the production collator, model and optimizer."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource
from mindvlm.models.own_training import text_inputs
from mindvlm.models.slime.names import HF
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.label_rules import IGNORED_LABEL
from mindvlm.processing.samples.llava_samples import expand_images
from mindvlm.training.datasets.collate import Collator, SampleBatch
from mindvlm.training.datasets.samples import Sample
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep, Update, UpdateFromBuffers
from mindvlm.training.step_runner import model_arguments
from mindvlm.training.trainable import choose_trainable
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.readme_rules import gradient_floor
from tests.golden_readers.report import TRAINING_BOUND, Report
from tests.golden_readers.slime_loaded import PLACEHOLDER, LoadedSlime

Row = tuple[str, np.ndarray, np.ndarray]
"""Name of the sample, its ids and its labels."""
Close = Callable[..., None]
NOTE = "as a training batch"
# what the official trainer exempts from decay: biases and norms of any kind
NO_DECAY = [r"bias$", r"(norm|ln_[a-z]+)\.weight$"]
OF_IMAGES = r"^(mm_projector|sampler)\."
ROUTER_NOISE = 0.1


class DecoderInputs(nn.Cell):
    """Computes the inputs of the decoder and their labels, and the order of the sequence."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, labels, places, *images):
        return *self.model.inputs(input_ids, labels, *images), self.model.inputs(input_ids, places, *images)[1]


class RecordedNoise(nn.Cell):
    """Returns recorded values in place of those of `RowNoise`."""

    def __init__(self, values: np.ndarray):
        super().__init__(auto_prefix=False)
        self.values = Tensor(values.astype(np.float32))

    def construct(self, num_rows, width):
        return self.values.reshape((num_rows, width))


@dataclass(frozen=True)
class RoutedBatch:
    """Inputs of the decoder.

    Attributes:
        embeds: (B, L, hidden).
        labels: (B, L).
        lengths: tokens of each row without what is left out.
        kept: indices of the local rows of each row that are kept.
        loss: mean over all labels.
    """

    embeds: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    kept: list[np.ndarray]
    loss: float


class TrainingReader:
    """Compares the training parts of a case."""

    def __init__(self, case: Case, report: Report, loaded: LoadedSlime, picture: Callable):
        self.case, self.report, self.loaded, self.picture = case, report, loaded, picture

    def collate(self, rows: list[Row], loaded: LoadedSlime) -> tuple[SampleBatch, list[int]]:
        """Returns the batch, and the length of each row."""
        samples, size = [], loaded.views.size
        for number, (name, ids, labels) in enumerate(rows):
            picture = self.picture(name, loaded)
            pictures = () if picture is None else (picture,)
            lengths = [len(one.layout) for one in pictures]
            sample = TrainingSample(ids, labels, (), "")
            sample = expand_images(sample, placeholder_id=PLACEHOLDER, num_tokens=0, lengths=lengths)
            samples.append(Sample(number, sample.input_ids, sample.labels, pictures, name, number))
        kinds = (("image",),) * loaded.views.has_global + (("crops",),) * loaded.views.has_crops
        collate = Collator(
            pad_id=0,
            placeholder_id=PLACEHOLDER,
            rows_per_view=loaded.views.num_global_tokens,
            kinds=kinds,
            pixel_shapes={"image": (3, size, size), "crops": (loaded.views.crops_per_view, 3, size, size)},
            has_choices=loaded.config.use != "global",
            image_slots=(1,) * len(kinds),
        )
        return collate(samples), [len(sample.labels) for sample in samples]

    def arguments(self, batch: SampleBatch) -> tuple[Tensor, ...]:
        inputs = text_inputs(
            batch.input_ids, batch.labels, batch.sources, tuple(batch.pixels.values()), 0, [], batch.choices
        )
        return model_arguments(inputs, self.loaded.engine.frequencies(1), ms.float32)

    def route(self, batch: SampleBatch, whole: list[int], loaded: LoadedSlime) -> RoutedBatch:
        ids, labels, inv_freq, *images = self.arguments(batch)
        places = Tensor(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy())
        found = DecoderInputs(loaded.model).set_train(loaded.model.training)(ids, labels, places, *images)
        loss, num_labels = loaded.model.text_loss(*found[:2], inv_freq)
        embeds, routed, order = (array.asnumpy() for array in found)
        lengths, kept = [], []
        for row, own in enumerate(order):
            local = np.flatnonzero(batch.choices[row, 1]) if batch.choices is not None else np.zeros(0, int)
            # what is left out is behind the padding, so that it follows a larger place
            ends = np.flatnonzero(np.diff(own) < 0)
            stays = own[: int(ends[0]) + 1] if len(ends) else own
            lengths.append(int((stays < whole[row]).sum()))
            kept.append(np.searchsorted(local, np.intersect1d(local, stays)).astype(np.int32))
        return RoutedBatch(embeds, routed, lengths, kept, float(loss.asnumpy() / max(num_labels.asnumpy(), 1)))

    def compare_batch(
        self,
        prefix: str,
        rows: list[Row],
        close: Close,
        loaded: LoadedSlime | None = None,
        *,
        max_length: int | None = None,
    ) -> None:
        """Compares the inputs and the loss of a batch whose sequences the model cuts to `max_length`."""
        loaded = loaded or self.loaded
        batch, whole = self.collate(rows, loaded)
        if max_length is not None:
            # samples are cut before; this recorded one is not, and the router saw its first ids
            text = batch.choices[:, 0]
            text[np.cumsum(text > 0, 1) > max_length] = 0
        routed = self.route(batch, whole, loaded)
        if max_length is not None:
            loaded.model.config = replace(loaded.config, max_length=max_length)
            # what is kept cannot be seen behind the cut
            lengths = [min(length, max_length) for length in routed.lengths]
            routed = replace(self.route(batch, whole, loaded), kept=routed.kept, lengths=lengths)
            loaded.model.config = loaded.config
        longest = max(routed.lengths)
        mask = np.arange(longest) < np.array(routed.lengths)[:, None]
        close(prefix, "attention_mask", mask.astype(np.int32), note=NOTE)
        close(prefix, "mm_labels", routed.labels[:, :longest], note=NOTE)
        close(prefix, "inputs_embeds", routed.embeds[:, :longest] * mask[..., None], axis=1, note=NOTE)
        for number, kept in enumerate(routed.kept):
            if f"{prefix}kept_indices.{number}" in self.report.recorded and len(kept):
                close(prefix, f"kept_indices.{number}", kept, note=NOTE)
        if (visual := self.report.recorded.get(f"{prefix}visual_tokens")) is not None:
            start = int(np.flatnonzero(rows[0][1] == PLACEHOLDER)[0])
            close(prefix, "visual_tokens", routed.embeds[0, start : start + len(visual)], note=NOTE)
        if (routed.labels[:, longest:] != IGNORED_LABEL).any():
            self.report.fail(f"{prefix}mm_labels", "labels behind the sequence", note=NOTE)
        if (routed.labels != IGNORED_LABEL).any():
            close(prefix, "loss", np.float32(routed.loss), note=NOTE)

    def compare_noise(self, prefix: str, rows: list[Row], inputs: dict[str, np.ndarray], close: Close) -> None:
        """Compares a batch of one sample in training mode with the recorded noise on gate and router."""
        model, config = self.loaded.model, self.loaded.model.config
        batch, whole = self.collate(rows, self.loaded)
        scores = np.zeros((1, batch.input_ids.shape[1]))
        scores[0, batch.choices[0, 1] > 0] = inputs[f"{prefix}router_noise"]
        adapter = model.mm_projector
        if (values := inputs.get(f"{prefix}gate_noise")) is not None:
            adapter.noise = RecordedNoise(values)
        model.noise = RecordedNoise(scores)
        model.config = replace(config, router=replace(config.router, noise=ROUTER_NOISE))
        model.set_train()
        try:
            self.compare_batch(prefix, rows, close)
            if adapter.noise is not None:
                gates = adapter.gates(model.tower_features(Tensor(batch.pixels["image"])))
                close(prefix, "gate_weights.0", gates.asnumpy()[0])
            ids, labels, inv_freq, *images = self.arguments(batch)
            routed = self.route(batch, whole, self.loaded)
            states = model.language_model(model.inputs(ids, labels, *images)[0], inv_freq)
            logits = model.language_model.lm_head(states).asnumpy()
            (length,) = routed.lengths
            close(prefix, "logits_last4", logits[:, length - 4 : length])
        finally:
            model.set_train(False)
            adapter.noise, model.noise, model.config = None, None, config

    def compare_steps(self, rows: list[Row], close: Close) -> None:
        """Compares gradients, norms and the weights after a step of each recorded optimizer; restores the weights."""
        model, document = self.loaded.model, self.case.documents["case.json"]
        before = {name: one.asnumpy().copy() for name, one in model.parameters_and_names()}
        model.set_train()
        choose_trainable(model, freeze=[], train={})
        model.stop_at_frozen_parts()
        options, groups = document["adamw"], self.case.documents["optimizer_groups.json"]
        plain = optimizer_config(options, no_decay=[])
        factor = document["trainer_args"]["mm_projector_lr"] / document["trainer_args"]["learning_rate"]
        official = optimizer_config(groups[0], no_decay=NO_DECAY, learning_rate_factors={OF_IMAGES: factor})
        self.compare_groups(groups, official)
        step = TrainStep(model, plain, accumulates=True)
        updates = {"adamw": step.update_graph}
        optimizer = TrainStep(model, official).optimizer
        updates["adamw_official"] = UpdateFromBuffers(Update(optimizer, None, None, None), step.accumulate_graph)
        batch = self.arguments(self.collate(rows, self.loaded)[0])
        for name, update in updates.items():
            for parameter in model.get_parameters():
                parameter.set_data(Tensor(before[parameter.name]))
            step.accumulate(*batch)
            if name == "adamw":
                self.compare_gradients(step)
            update(Tensor(plain.learning_rate, ms.float32))
            after = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
            self.compare_parameters(f"{name}/", after, floor=gradient_floor(self.case))
        for parameter in model.get_parameters():
            parameter.set_data(Tensor(before[parameter.name]))
        model.set_train(False)

    def compare_groups(self, groups: list[dict], config: OptimizerConfig) -> None:
        """Compares the learning rate and the decay of each tensor in the official groups."""
        native = {parameter.name: parameter for parameter in self.loaded.model.get_parameters()}
        plan = make_plan(HF.reverse(), self.loaded.infos)
        pairs = []
        for group in groups:
            for name in group["params"]:
                ours = plan.sources_of(name)[0]
                rate = config.learning_rate * config.learning_rate_factor(ours)
                decay = config.weight_decay if config.decays(ours) else 0.0
                pairs.append((name, (round(rate, 12), decay), (group["lr"], group["weight_decay"])))
        named = {plan.targets_of(name)[0] for name, one in native.items() if one.requires_grad}
        flagged = {name for group in groups for name in group["params"]}
        # flagged, but without a gradient
        pairs.append(("trained", named, {one for one in flagged if not one.endswith("w_noise")}))
        self.report.same("optimizer_groups.json", pairs)

    def compare_gradients(self, step: TrainStep) -> None:
        passes = step.accumulate_graph
        count = passes.num_labels.asnumpy()
        self.report.close("batch.loss", passes.loss.asnumpy() / count, note="of the step")
        arrays = {name: np.zeros(info.shape, np.float32) for name, info in self.loaded.infos.items()}
        for buffer in passes.buffers:
            arrays[buffer.name.split("gradient.", 1)[1]] = buffer.asnumpy() / count
        original = self.compare_parameters("grad/", arrays)
        names = self.case.documents["case.json"]["all_trainable"]
        norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in original.items()}
        recorded = self.report.recorded["grad_norm_each"]
        each = np.array([-1.0 if name.endswith("w_noise") else norms[name] for name in names])
        self.report.close("grad_norm_each", each, bound=TRAINING_BOUND, at=recorded > -np.inf)
        total = np.sqrt(sum(norm**2 for norm in norms.values()))
        self.report.close("grad_norm_total", total, bound=TRAINING_BOUND)

    def compare_parameters(self, prefix: str, arrays: dict[str, np.ndarray], *, floor: float = 0.0) -> dict:
        """Compares recorded arrays of this prefix, with a floor only where the gradient exceeds it."""
        source = MemorySource(arrays)
        view = make_plan(HF.reverse(), source.infos).view(source)
        original = {name: view.read(name).data for name in view.infos}
        for name in [name for name in self.report.recorded if re.match(prefix, name)]:
            parameter, at, note = name.removeprefix(prefix), None, ""
            gradient = self.report.recorded.get(f"grad/{parameter}")
            if floor and gradient is not None:
                at, note = np.abs(gradient) > floor, f"|grad| > {floor:g}"
            self.report.close(name, original[parameter], bound=TRAINING_BOUND, at=at, note=note)
        return original


def optimizer_config(options: dict, **settings) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=options["lr"],
        betas=options["betas"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        max_grad_norm=None,
        **settings,
    )
