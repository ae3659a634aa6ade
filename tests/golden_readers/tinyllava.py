"""Cases of a whole TinyLLaVA with tiny weights: forward, generation and training of each scenario in scenarios.json."""

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.request import Request
from mindvlm.nn.linear import Linear
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.nn.splice import splice_sources
from tests.golden_readers import kernels
from tests.golden_readers.case import Case
from tests.golden_readers.language import DecoderStates, features_of_rows
from tests.golden_readers.loaded import RecordingEngine
from tests.golden_readers.report import Report
from tests.golden_readers.tinyllava_loaded import LoadedTinyLlava
from tests.golden_readers.tinyllava_scenario import IGNORED, PLACEHOLDER, Scenario, find_scenarios
from tests.golden_readers.tinyllava_training import compare_training
from tests.golden_readers.training import MergedLoss

MODEL_TYPES = ("tiny_llava", "tiny_llava_phi", "tiny_llava_stablelm", "tinyllava", "llava")


def is_tinyllava(case: Case) -> bool:
    """Returns whether the case is a model with weights and scenarios."""
    return (
        case.weights.exists()
        and case.config.get("model_type") in MODEL_TYPES
        and "scenarios" in (case.documents.get("scenarios.json") or {})
    )


class VisionStates(nn.Cell):
    """Computes the tower's states (the last one after the final norm), its feature and the connector's output."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixels):
        states, _ = self.model.vision_tower.hidden_states(pixels)
        normed = self.model.vision_tower.post_layernorm(states[-1])
        return states, normed, self.model.tower_features(pixels), self.model.encode_images(pixels)


class TinyLlavaReader:
    """Runs the scenarios of one case and compares the recorded values of each."""

    def __init__(self, case: Case, report: Report, mode: str):
        self.case, self.report, self.graph_mode = case, report, mode == "graph"
        self.loaded = LoadedTinyLlava(case)
        self.placeholder = case.config.get("image_token_index", PLACEHOLDER)
        self.set_model(self.loaded)

    def set_model(self, loaded: LoadedTinyLlava) -> None:
        self.model, self.config = loaded.model, loaded.config
        # tiny models are recorded beyond the positions that their config names
        self.engine = RecordingEngine(
            loaded.model, placeholder_id=PLACEHOLDER, max_length=256, graph_mode=self.graph_mode
        )
        self.states = DecoderStates(loaded.model.language_model)
        self.vision = VisionStates(loaded.model)
        self.merged_loss = MergedLoss(loaded.model)
        scenarios = self.scenarios()
        # all run in one shape, so that each graph is compiled once
        self.batch_size = max(len(scenario.rows) for scenario in scenarios)
        self.length = max(len(row) for scenario in scenarios for row in scenario.rows)
        self.num_images = max(len(one.pixels) for one in scenarios if one.pixels is not None)

    def read(self) -> None:
        self.compare_sizes()
        for scenario in self.scenarios():
            selected = scenario.options.get("tower_select")
            num_dropped = self.config.num_dropped_tokens if selected is None else int(selected == "patch")
            if num_dropped != self.config.num_dropped_tokens:
                num_tokens = self.config.vision_tower.num_tokens - num_dropped
                tokens = self.config.connector.num_tokens(num_tokens)
                self.set_model(LoadedTinyLlava(self.case, num_dropped_tokens=num_dropped, image_token_len=tokens))
                scenario = next(one for one in self.scenarios() if one.name == scenario.name)
                self.compare(scenario)
                self.set_model(self.loaded)
            else:
                self.compare(scenario)
        if kernels.in_use == "off":
            compare_training(self.case, self.report, {scenario.name: scenario for scenario in self.scenarios()})

    def scenarios(self) -> list[Scenario]:
        return find_scenarios(self.case, image_token_len=self.config.image_token_len, placeholder=self.placeholder)

    def compare_sizes(self) -> None:
        """Compares the numbers of tensors and parameters, and the Linears that get LoRA adapters in the original."""
        document = self.case.documents["scenarios.json"]
        shapes = parameter_shapes(self.model)
        known = {
            "num_tensors": len(shapes),
            "num_params": sum(map(math.prod, shapes.values())),
            "lora_target_modules": sorted(self.lora_targets()),
        }
        pairs = [(key, value, document[key]) for key, value in known.items() if key in document]
        self.report.same("scenarios.json", pairs)

    def lora_targets(self) -> set[str]:
        cells = self.model.language_model.cells_and_names()
        linears = [name for name, cell in cells if isinstance(cell, Linear) and name != "lm_head"]
        names = [self.loaded.original_name(f"language_model.{name}.weight") for name in linears]
        return {name.split(".")[-2] for name in names}

    def compare(self, scenario: Scenario) -> None:
        recorded = {
            name.removeprefix(f"{scenario.name}."): name
            for name in self.case.outputs
            if name.startswith(f"{scenario.name}.")
        }
        features = self.compare_vision(scenario, recorded)
        self.compare_forward(scenario, recorded, features)
        if "greedy_ids" in recorded and scenario.is_cut_in_a_picture:
            for item in ("greedy_ids", "greedy_step_logits", "greedy_ids_until_eos"):
                if item in recorded:
                    self.report.skip(recorded[item], "a prompt that is cut inside a picture cannot be asked here")
        elif "greedy_ids" in recorded:
            self.compare_generation(scenario, recorded, features)
        if "greedy_margin" in recorded:
            self.report.skip(recorded["greedy_margin"], "the margin of greedy_step_logits, which is compared")

    def compare_vision(self, scenario: Scenario, recorded: dict[str, str]) -> Tensor | None:
        """Compares tower and connector; returns the features (N, T, hidden) of the images used in rows."""
        if scenario.pixels is None:
            return None
        count = len(scenario.pixels)
        blank = np.zeros((self.num_images - count, *scenario.pixels.shape[1:]), np.float32)
        states, normed, features, connected = self.vision(Tensor(np.concatenate([scenario.pixels, blank])))
        known = {
            "vision_features": features.asnumpy()[:count],
            "connector_output": connected.asnumpy()[:count],
            "vision_hidden_states": np.stack([state.asnumpy()[:count] for state in states]),
            "vision_last_hidden_state_post_layernorm": normed.asnumpy()[:count],
        }
        if self.config.vision_tower.dialect == "clip":
            # CLIP norms its class token alone
            known["vision_last_hidden_state_post_layernorm"] = states[-1].asnumpy()[:count]
        for item, array in known.items():
            if item in recorded:
                self.report.close(recorded[item], array)
        return Tensor(connected.asnumpy()[scenario.used]) if scenario.used else None

    def in_shape(self, array: np.ndarray, fill: int) -> np.ndarray:
        """Pads an array (B, L) of a scenario with `fill` to the shape in which all scenarios run."""
        room = ((0, self.batch_size - array.shape[0]), (0, self.length - array.shape[1]))
        return np.pad(array, room, constant_values=fill)

    def merged(self, scenario: Scenario, features: Tensor | None) -> Tensor:
        """Returns the merged embeddings, padded on the right to the shape in which all scenarios run."""
        ids = self.in_shape(scenario.padded(scenario.rows, 0), 0)
        if scenario.max_length is None:
            return self.engine.merged_embeddings(ids, features)
        if features is None:
            return self.engine.merged_embeddings(self.in_shape(scenario.padded(scenario.kept_rows, 0), 0), None)
        num_images, image_token_len, _ = features.shape
        sources = splice_sources(ids, num_images, image_token_len, PLACEHOLDER, max_length=scenario.max_length)
        cut = np.ascontiguousarray(ids[:, : sources.shape[1]])
        embeds = self.engine.runner.run("prefill", self.engine.merge, Tensor(cut), features, Tensor(sources)).asnumpy()
        return Tensor(np.pad(embeds, ((0, 0), (0, self.length - embeds.shape[1]), (0, 0))))

    def compare_forward(self, scenario: Scenario, recorded: dict[str, str], features: Tensor | None) -> None:
        embeds = self.merged(scenario, features)
        inv_freq = self.engine.frequencies(1)
        states, normed, logits = self.engine.runner.run("prefill", self.states, embeds, inv_freq)
        valid = scenario.valid
        num_rows, length = valid.shape
        labels = scenario.padded(scenario.labels or [[IGNORED]] * num_rows, IGNORED)[:, :length]
        positions = np.where(scenario.padded([[1] * n for n in scenario.lengths], 0), np.arange(length), 0)
        last = [*states[:-1], normed]
        known = {
            "merged_embeds": embeds.asnumpy()[:num_rows, :length],
            "last_hidden_state": normed.asnumpy()[:num_rows, :length],
            "logits": logits.asnumpy()[:num_rows, :length],
        }
        for item, array in known.items():
            if item in recorded:
                self.report.close(recorded[item], scenario.as_recorded(array), at=valid)
        if "hidden_states" in recorded:
            stacked = np.stack([scenario.as_recorded(state.asnumpy()[:num_rows, :length]) for state in last])
            self.report.close(recorded["hidden_states"], stacked, at=np.stack([valid] * len(last)))
        whole = {
            "merged_labels": scenario.as_recorded(labels),
            "merged_valid": valid.astype(np.int32),
            "merged_attention_mask": valid.astype(np.int32),
        }
        for item, array in whole.items():
            if item in recorded:
                self.report.close(recorded[item], array)
        if "merged_position_ids" in recorded:
            self.report.close(recorded["merged_position_ids"], scenario.as_recorded(positions), at=valid)
        if "loss" in recorded:
            self.report.close(recorded["loss"], self.loss(embeds, self.in_shape(labels, IGNORED), inv_freq))

    def loss(self, embeds: Tensor, labels: np.ndarray, inv_freq: Tensor) -> np.ndarray:
        return self.merged_loss(embeds, Tensor(labels.astype(np.int32)), inv_freq).asnumpy()

    def compare_generation(self, scenario: Scenario, recorded: dict[str, str], features: Tensor | None) -> None:
        """Compares greedy tokens with the cache, the logits of each, and the run that an end token stops."""
        expected = self.case.outputs[recorded["greedy_ids"]]
        ids = self.generate(scenario, features, expected.shape[1])
        self.report.close(recorded["greedy_ids"], np.array(ids, np.int32))
        self.report.close(recorded["greedy_step_logits"], np.stack(self.engine.recorded, 1))
        if "greedy_ids_until_eos" in recorded:
            end = self.case.outputs[recorded["eos_token_id"]].tolist()
            ids = self.generate(scenario, features, expected.shape[1], end)
            self.report.close(recorded["greedy_ids_until_eos"], np.array(ids, np.int32))
            self.report.skip(recorded["eos_token_id"], "an input")

    def generate(
        self, scenario: Scenario, features: Tensor | None, num_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy ids of all rows, up to one of `ends` where there are some."""
        rows = [list(row) for row in scenario.kept_rows]
        self.engine.resize(len(rows))
        requests = [
            Request(
                ids=row,
                features=of_row,
                options=GenerationConfig(max_new_tokens=num_tokens),
                stop=lambda token: "stop_token" if token in ends else None,
            )
            for row, of_row in zip(rows, features_of_rows(rows, features, PLACEHOLDER), strict=True)
        ]
        return [slot.new_ids for slot in self.engine.complete(requests)]


def read_tinyllava(case: Case, report: Report, mode: str) -> None:
    TinyLlavaReader(case, report, mode).read()
