"""Cases of a whole SliME with tiny weights: adapters, router, forward and generation of each sample."""

import re
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.graphs import bucket_length
from mindvlm.generation.request import Request
from mindvlm.models.slime.hf_config import MODEL_TYPES, is_slime
from mindvlm.models.slime.processor import SlimePixels
from mindvlm.models.slime.router import probabilities
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.images.transforms import normalize
from mindvlm.processing.samples.label_rules import IGNORED_LABEL
from tests.golden_readers import kernels
from tests.golden_readers.case import Case, read_arrays
from tests.golden_readers.language import DecoderStates
from tests.golden_readers.report import PIXEL_BOUND, Report, relative_error
from tests.golden_readers.slime_loaded import NOTHING, PLACEHOLDER, STAGES, LoadedSlime, RoutedPicture
from tests.golden_readers.slime_training import Row, TrainingReader
from tests.golden_readers.training import MergedLoss

VARIANTS = "variants.json"
# keys of config.json that change the graphs of the vision part
GRAPH_KEYS = {"mm_learnable_gated", "mm_vision_select_layer"}


def is_slime_case(case: Case) -> bool:
    """Returns whether the case is a SliME with weights."""
    return case.weights.exists() and case.config.get("model_type") in MODEL_TYPES and is_slime(case.config)


@dataclass(frozen=True)
class Merged:
    """A prompt with its picture, as the decoder gets it."""

    embeds: np.ndarray
    labels: np.ndarray
    picture: RoutedPicture | None
    start: int

    @property
    def span(self) -> np.ndarray:
        """Start and end of the visual rows."""
        return np.array([self.start, self.start + len(self.picture.rows)], np.int32)

    def cut(self, length: int | None) -> "Merged":
        return Merged(self.embeds[:length], self.labels[:length], self.picture, self.start)


class SlimeReader:
    """Runs the samples of one case and compares the recorded values of each."""

    def __init__(self, case: Case, report: Report, mode: str):
        self.case, self.report, self.graph_mode = case, report, mode == "graph"
        self.loaded = LoadedSlime(case, self.graph_mode)
        self.engine = self.loaded.engine
        self.states = DecoderStates(self.loaded.model.language_model)
        self.merged_loss = MergedLoss(self.loaded.model)
        self.training = TrainingReader(case, report, self.loaded, self.picture)
        self.samples = {one["name"]: one for one in case.documents["records.json"]}
        longest = max(len(ids) for name, ids in case.inputs.items() if name.endswith(".input_ids") and ids.ndim == 1)
        # all samples run in one shape, so that each graph is compiled once
        self.length = bucket_length(longest + self.loaded.config.image_token_len)

    def read(self) -> None:
        for name in self.samples:
            self.compare_pixels(name)
            self.compare_stages(name)
            self.compare_sample(name)
            self.compare_generation(name)
        if "batch.input_ids" in self.case.inputs:
            self.compare_batch("batch.", self.loaded, self.batch_rows())
        self.compare_variants()
        if "batch.input_ids" in self.case.inputs:
            self.training.compare_batch("batch.", self.batch_rows(), self.close)
            if kernels.in_use == "off":
                self.training.compare_steps(self.batch_rows(), self.close)

    def close(self, prefix: str, name: str, array: np.ndarray, *, axis: int | None = None, **options) -> None:
        """Compares an array with the recorded one, with its sampled rows and with its sums."""
        array = np.asarray(array)
        axis = int(array.ndim == 3) if axis is None else axis
        for recorded in list(self.report.recorded):
            found = re.fullmatch(rf"{re.escape(prefix + name)}(?:__s(\d+)|__(sums))?", recorded)
            if not found:
                continue
            shown = array
            if found[1]:
                shown = array.take(np.arange(0, array.shape[axis], int(found[1])), axis)
            elif found[2]:
                wide = array.astype(np.float64)
                shown = np.array([wide.sum(), np.abs(wide).sum(), (wide**2).sum()])
            self.report.close(recorded, shown, **({} if found[2] else options))

    def text_of(self, ids: np.ndarray) -> list[int]:
        return [int(token) for token in ids if token != PLACEHOLDER]

    def picture(self, name: str, loaded: LoadedSlime | None = None) -> Picture | None:
        pixels = self.case.inputs.get(f"{name}.pixel_values")
        if pixels is None:
            return None
        return (loaded or self.loaded).picture(pixels, self.case.inputs[f"{name}.image_size"].tolist())

    def merge(
        self,
        ids: np.ndarray,
        picture: Picture | None,
        *,
        labels: np.ndarray | None = None,
        loaded: LoadedSlime | None = None,
        max_length: int | None = None,
    ) -> Merged:
        """Merges a prompt and its picture; the text for the router is cut to `max_length` like the result."""
        labels = np.full(len(ids), IGNORED_LABEL) if labels is None else labels
        if picture is None:
            return Merged(self.embed(ids, None), labels, None, 0)
        routed = (loaded or self.loaded).routed(picture, self.text_of(ids)[:max_length])
        num_rows = len(routed.rows)
        repeats = np.where(ids == PLACEHOLDER, num_rows, 1)
        expanded = np.repeat(np.where(ids == PLACEHOLDER, IGNORED_LABEL, labels), repeats)
        embeds = self.embed(np.repeat(ids, repeats), routed.rows)
        return Merged(embeds, expanded, routed, int(np.flatnonzero(ids == PLACEHOLDER)[0])).cut(max_length)

    def embed(self, ids: np.ndarray, rows: Tensor | None) -> np.ndarray:
        padded = np.zeros((1, self.length), np.int32)
        padded[0, : len(ids)] = ids
        return self.engine.merged_embeddings(padded, rows).asnumpy()[0, : len(ids)]

    def forward(self, merged: Merged) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, float, int]:
        """Returns the states of all layers, the normed state, the logits, the summed loss and the number of labels."""
        room = ((0, self.length - len(merged.embeds)), (0, 0))
        embeds, inv_freq = Tensor(np.pad(merged.embeds, room)[None]), self.engine.frequencies(1)
        states, normed, logits = self.engine.runner.run("prefill", self.states, embeds, inv_freq)
        labels = np.pad(merged.labels, room[0], constant_values=IGNORED_LABEL).astype(np.int32)
        num_labels = int((labels[1:] != IGNORED_LABEL).sum())
        loss = float(self.merged_loss(embeds, Tensor(labels[None]), inv_freq).asnumpy()) if num_labels else 0.0
        cut = [array.asnumpy()[0, : len(merged.embeds)] for array in (*states, normed, logits)]
        return cut[:-2], cut[-2], cut[-1], loss * num_labels, num_labels

    def compare_pixels(self, name: str) -> None:
        """Compares the views that the production code cuts from the picture with the recorded ones."""
        pixels = self.case.inputs.get(f"{name}.pixel_values")
        path = self.case.folder / self.samples[name].get("image", "")
        if pixels is None or not path.is_file():
            return
        image, views = load_image(path), self.loaded.views
        parts, _ = views.crops(image)
        ours = np.stack([normalize(part) for part in (views.global_view(image), *parts)])
        error = relative_error(ours, pixels) if ours.shape == pixels.shape else float("inf")
        self.report.check(f"{name}.pixel_values", error, bound=PIXEL_BOUND, note="from the picture")

    def compare_stages(self, name: str) -> None:
        pixels = self.case.inputs.get(f"{name}.pixel_values")
        if pixels is None:
            return
        found = self.engine.runner.run("vision", self.loaded.stages, Tensor(pixels))
        for stage, array in zip(STAGES, found, strict=True):
            array = array.asnumpy()
            self.close(f"{name}.", stage, array[0] if stage.startswith(("global", "gate")) else array)

    def compare_sample(self, name: str) -> None:
        ids, prefix = self.case.inputs.get(f"{name}.input_ids"), f"{name}."
        if ids is None:
            return
        merged = self.merge(ids, self.picture(name), labels=self.case.inputs.get(f"{name}.labels"))
        self.compare_router(prefix, ids, merged)
        self.compare_forward(prefix, merged)

    def compare_router(self, prefix: str, ids: np.ndarray, merged: Merged, suffix: str = "") -> None:
        routed, text = merged.picture or NOTHING, self.text_of(ids)
        # the original's masks are as long as those of the whole batch
        length = len(self.report.recorded.get(f"{prefix}text_mask{suffix}", ids))
        known = {
            "local_merged": routed.merged,
            "text_mask": (np.arange(length) < len(text)).astype(np.int32),
            "router_scores": routed.scores,
            "router_probs": probabilities(routed.scores, self.loaded.config.router),
            "kept_indices": routed.kept,
            "local_tokens": routed.merged[routed.kept],
        }
        if f"{prefix}text_embeddings" in self.report.recorded:
            embeds = self.embed(np.array(text), None)
            known["text_embeddings"] = np.concatenate((embeds, np.zeros((length - len(text), embeds.shape[1]))))
        for item, array in known.items():
            self.close(prefix, item + suffix, array)

    def compare_forward(self, prefix: str, merged: Merged) -> None:
        states, normed, logits, loss, num_labels = self.forward(merged)
        known = {
            "inputs_embeds": merged.embeds,
            "attention_mask": np.ones(len(merged.embeds), np.int32),
            "mm_labels": merged.labels.astype(np.int32),
            "hidden_after_layer0": states[1],
            "last_hidden_state": normed,
            "logits": logits,
        }
        if merged.picture is not None:
            known["visual_span"] = merged.span
        if num_labels:
            known["loss"] = np.float32(loss / num_labels)
        positions = self.report.recorded.get(f"{prefix}logits_positions")
        if positions is not None:
            self.report.skip(f"{prefix}logits_positions", "an input")
            known["logits_at_positions"] = logits[positions]
        for item, array in known.items():
            self.close(prefix, item, array)

    def compare_generation(self, name: str) -> None:
        ids, recorded = self.case.inputs.get(f"{name}.gen_input_ids"), self.report.recorded
        if ids is None:
            return
        picture, rows, expanded = self.picture(name), None, ids
        if picture is not None:
            routed = self.loaded.routed(picture, self.text_of(ids))
            rows, expanded = routed.rows, np.repeat(ids, np.where(ids == PLACEHOLDER, len(routed.rows), 1))
            self.close(f"{name}.gen_", "router_scores", routed.scores)
            self.close(f"{name}.gen_", "kept_indices", routed.kept)
        options = GenerationConfig(max_new_tokens=len(recorded[f"{name}.gen_greedy_ids"]))
        self.engine.resize(1)
        (slot,) = self.engine.complete([Request(ids=expanded.tolist(), features=rows, options=options)])
        self.report.close(f"{name}.gen_greedy_ids", np.array(slot.new_ids, np.int32))
        self.report.close(f"{name}.gen_step_logits", np.concatenate(self.engine.recorded))
        if f"{name}.gen_returned_ids" in recorded:
            # behind a mark that the original adds
            returned = [self.case.config["bos_token_id"], *slot.new_ids]
            self.report.close(f"{name}.gen_returned_ids", np.array(returned, np.int32))

    def batch_rows(self) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
        """Returns the sample, ids and labels of each row of the recorded batch, without padding."""
        inputs, names = self.case.inputs, list(self.samples)
        rows = zip(inputs["batch.order"], inputs["batch.input_ids"], inputs["batch.labels"], strict=True)
        masks = inputs["batch.attention_mask"].astype(bool)
        return [(names[n], ids[mask], labels[mask]) for (n, ids, labels), mask in zip(rows, masks, strict=True)]

    def compare_batch(self, prefix: str, loaded: LoadedSlime, rows: list, *, left: bool = False) -> None:
        """Compares a batch; each row is computed alone, because no row depends on another."""
        found = [
            self.merge(ids, self.picture(name, loaded), labels=labels, loaded=loaded) for name, ids, labels in rows
        ]
        length = max(len(one.embeds) for one in found)

        def padded(arrays: list[np.ndarray], fill: float) -> np.ndarray:
            rooms = [length - len(array) for array in arrays]
            pads = [(room, 0) if left else (0, room) for room in rooms]
            pads = [(pad, *[(0, 0)] * (array.ndim - 1)) for pad, array in zip(pads, arrays, strict=True)]
            return np.stack([np.pad(a, pad, constant_values=fill) for a, pad in zip(arrays, pads, strict=True)])

        valid = padded([np.ones(len(one.embeds)) for one in found], 0).astype(bool)
        self.close(prefix, "attention_mask", valid.astype(np.int32))
        self.close(prefix, "mm_labels", padded([one.labels for one in found], IGNORED_LABEL).astype(np.int32))
        self.close(prefix, "inputs_embeds", padded([one.embeds for one in found], 0), axis=1)
        results = [self.forward(one) for one in found]
        logits = padded([one[2] for one in results], 0)
        if (places := self.report.recorded.get(f"{prefix}supervised_positions")) is not None:
            labels = padded([one.labels for one in found], IGNORED_LABEL)
            self.close(prefix, "supervised_positions", np.argwhere(labels[:, 1:] != IGNORED_LABEL).astype(np.int32))
            self.close(prefix, "supervised_logits", logits[tuple(places.T)])
        self.close(prefix, "logits_last4", logits[:, -4:], at=valid[:, -4:])
        num_labels = sum(one[4] for one in results)
        if num_labels:
            self.close(prefix, "loss", np.float32(sum(one[3] for one in results) / num_labels))
        for number, ((_, ids, _), one) in enumerate(zip(rows, found, strict=True)):
            self.compare_router(prefix, ids, one, f".{number}")

    def compare_variants(self) -> None:
        """Compares the runs of variants.json: the same weights with other keys in config.json."""
        recorded, inputs = (read_arrays(self.case.folder / f"variants_{kind}.npz") for kind in ("outputs", "inputs"))
        self.report.recorded.update(recorded)
        self.report.open_names |= recorded.keys()
        for name, variant in self.case.documents.get(VARIANTS, {}).items():
            if f"{name}.router_noise" in inputs:
                before = {key: self.case.config[key] for key in variant["config_overrides"]}
                self.loaded.change(variant["config_overrides"])
                self.training.compare_noise(f"{name}.", self.whole_rows([variant["sample"]]), inputs, self.close)
                self.loaded.change(before)
            else:
                self.compare_variant(name, variant, inputs)

    def compare_variant(self, name: str, variant: dict, inputs: dict[str, np.ndarray]) -> None:
        changes, prefix, names = variant["config_overrides"], f"{name}.", variant["sample"].split(",")
        loaded = self.loaded
        if GRAPH_KEYS & changes.keys():
            loaded = LoadedSlime(self.case, self.graph_mode, changes)
        before = {key: self.case.config[key] for key in changes}
        loaded.change(changes)
        for number, sample in enumerate(names):
            self.compare_gates(f"{prefix}gate_weights.{number}", sample, loaded)
        if name == "images_4d":
            self.compare_plain_views(prefix, inputs)
        elif name.startswith("batch_") and name.endswith("_list"):
            side = name.split("_")[1]
            batch = zip(inputs[f"batch2.{side}_ids"], inputs[f"batch2.{side}_mask"].astype(bool), strict=True)
            rows = [(sample, ids[mask], None) for sample, (ids, mask) in zip(names, batch, strict=True)]
            self.compare_batch(prefix, loaded, rows, left=side == "left")
        elif len(names) > 1:
            self.compare_batch(prefix, loaded, self.batch_rows())
        else:
            whole = name != "no_attention_mask"
            ids = self.case.inputs[f"{names[0]}.{'' if whole else 'gen_'}input_ids"]
            labels = self.case.inputs[f"{names[0]}.labels"] if whole else None
            max_length = changes.get("tokenizer_model_max_length")
            picture = self.picture(names[0], loaded)
            merged = self.merge(ids, picture, labels=labels, loaded=loaded, max_length=max_length)
            self.compare_router(prefix, ids, merged, ".0")
            self.close(prefix, "visual_tokens", merged.picture.rows.asnumpy())
            self.compare_single(prefix, merged)
        # a graph would be compiled for each variant
        if f"{prefix}mm_labels" in self.report.recorded and not self.graph_mode:
            max_length = changes.get("tokenizer_model_max_length")
            rows = self.batch_rows() if len(names) > 1 else self.whole_rows(names)
            self.training.compare_batch(prefix, rows, self.close, loaded, max_length=max_length)
        self.loaded.change(before)

    def whole_rows(self, names: list[str]) -> list[Row]:
        """Returns the recorded ids and labels of whole samples."""
        inputs = self.case.inputs
        return [(name, inputs[f"{name}.input_ids"], inputs[f"{name}.labels"]) for name in names]

    def compare_single(self, prefix: str, merged: Merged) -> None:
        """Compares the arrays of a variant with one sample, which have a batch axis."""
        _, _, logits, loss, num_labels = self.forward(merged)
        self.close(prefix, "inputs_embeds", merged.embeds[None])
        self.close(prefix, "attention_mask", np.ones((1, len(merged.embeds)), np.int32))
        self.close(prefix, "mm_labels", merged.labels[None].astype(np.int32))
        self.close(prefix, "logits_last4", logits[None, -4:])
        if num_labels:
            self.close(prefix, "loss", np.float32(loss / num_labels))
        elif f"{prefix}loss" in self.report.recorded:
            self.close(prefix, "loss", np.float32(np.nan))

    def compare_gates(self, recorded: str, sample: str, loaded: LoadedSlime) -> None:
        if recorded not in self.report.recorded or recorded.startswith("images_4d"):
            return
        size = loaded.views.size
        # a sample without a picture has a blank view
        pixels = self.case.inputs.get(f"{sample}.pixel_values", np.zeros((2, 3, size, size), np.float32))
        gates = self.engine.runner.run("vision", loaded.stages, Tensor(pixels))[STAGES.index("gate_weights")]
        self.report.close(recorded, gates.asnumpy()[0])

    def compare_plain_views(self, prefix: str, inputs: dict[str, np.ndarray]) -> None:
        """Compares a batch whose pictures are one view each: neither crops nor a separator."""
        layout = np.arange(self.loaded.config.num_global_tokens, dtype=np.int32)
        batch = zip(
            inputs["batch2.right_ids"], inputs["batch2.right_mask"].astype(bool), inputs["views4d"], strict=True
        )
        found = []
        for ids, mask, view in batch:
            found.append(self.merge(ids[mask], Picture((SlimePixels(view),), layout)))
        length = max(len(one.embeds) for one in found)
        embeds = np.stack([np.pad(one.embeds, ((0, length - len(one.embeds)), (0, 0))) for one in found])
        valid = np.arange(length) < np.array([[len(one.embeds)] for one in found])
        self.close(prefix, "inputs_embeds", embeds)
        self.close(prefix, "attention_mask", valid.astype(np.int32))
        logits = [self.forward(one)[2] for one in found]
        last = np.stack([np.pad(one, ((0, length - len(one)), (0, 0)))[-4:] for one in logits])
        self.close(prefix, "logits_last4", last, at=valid[:, -4:])
        gates = [
            self.engine.runner.run("vision", self.loaded.stages, Tensor(np.stack((view, view))))[
                STAGES.index("gate_weights")
            ]
            for view in inputs["views4d"]
        ]
        self.close(prefix, "gate_weights.0", np.concatenate([one.asnumpy()[0] for one in gates]))


def read_slime(case: Case, report: Report, mode: str) -> None:
    SlimeReader(case, report, mode).read()
