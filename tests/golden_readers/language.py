"""Cases with the language model: the decoder alone, or a whole model with images as arrays or files."""

import itertools

import numpy as np
from mindspore import Tensor, nn

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.answer import AnswerText
from mindvlm.generation.request import Request, Slot
from mindvlm.nn.rotary import logn_scale
from tests.golden_readers import kernels
from tests.golden_readers.case import Case
from tests.golden_readers.loaded import LoadedVary, RecordingEngine
from tests.golden_readers.pictures import PictureInputs, picture_inputs
from tests.golden_readers.prompts import Prompt, find_prompts
from tests.golden_readers.report import Report
from tests.golden_readers.top_values import compare_top_values
from tests.golden_readers.training import compare_training, eval_loss


class VisionStages(nn.Cell):
    """Computes the features of the towers and the output of the projectors."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *pixels):
        return self.model.tower_features(*pixels), self.model.encode_images(*pixels)


class DecoderStates(nn.Cell):
    """Computes the input of every layer, the last layer's output before and after the final norm, and the logits."""

    def __init__(self, language_model):
        super().__init__(auto_prefix=False)
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        states = self.language_model.layer_states(embeds, inv_freq)
        normed = self.language_model.norm(states[-1])
        return states, normed, self.language_model.lm_head(normed)


class LognTable(nn.Cell):
    """Computes the query scales of positions 0, 1, ...: (1, L) -> (1, 1, L, 1)."""

    def __init__(self, training_length: int):
        super().__init__(auto_prefix=False)
        self.training_length = training_length

    def construct(self, positions):
        return logn_scale(positions, self.training_length)


class LanguageReader:
    """Runs the prompts of one case and compares the recorded values of each."""

    def __init__(self, case: Case, report: Report, mode: str):
        self.case, self.report = case, report
        self.loaded = LoadedVary(case)
        self.pictures: PictureInputs | None = picture_inputs(case, self.loaded.config)
        num_images = len(self.pictures.pixels[0]) if self.pictures else 0
        self.prompts = find_prompts(case, num_images=num_images)
        longest = max(prompt.input_ids.shape[1] for prompt in self.prompts)
        longest += max((self.num_steps(prompt) for prompt in self.prompts), default=0)
        self.engine: RecordingEngine = self.loaded.engine(case, graph_mode=mode == "graph", max_length=longest + 1)
        self.states = DecoderStates(self.loaded.model.language_model)
        self.towers: dict[str, np.ndarray] = {}
        self.features: np.ndarray | None = None

    def read(self) -> None:
        if self.pictures:
            self.pictures.compare(self.report)
            self.encode()
        for prompt in self.prompts:
            self.compare_forward(prompt)
            self.compare_generation(prompt)
        if "logn_table" in self.case.outputs:
            table = self.case.outputs["logn_table"]
            positions = np.arange(len(table), dtype=np.int32)[None]
            scale = LognTable(self.engine.config.training_length)(Tensor(positions))
            self.report.close("logn_table", scale.asnumpy().reshape(-1))
        if kernels.in_use == "off":
            compare_training(self.case, self.report, self.loaded, self.prompts, self.pictures)

    def encode(self) -> None:
        """Runs the towers and the projectors over all images of the case."""
        stages = VisionStages(self.loaded.model)
        towers, features = stages(*map(Tensor, self.pictures.pixels))
        self.features = features.asnumpy()
        if self.loaded.config.is_tiny:
            self.towers = {"sam_feature": towers.asnumpy(), "projected": self.features}
            return
        clip, vocabulary = towers
        half = self.features.shape[-1] // 2
        self.towers = {
            "clip_feature": clip.asnumpy(),
            "sam_feature": vocabulary.asnumpy(),
            "clip_projected": self.features[..., :half],
            "sam_projected": self.features[..., half:],
        }

    def features_of(self, prompt: Prompt) -> Tensor | None:
        return Tensor(self.features[prompt.images]) if prompt.images else None

    def compare_forward(self, prompt: Prompt) -> None:
        """Compares all outputs of one pass over the prompt."""
        wanted = {item: name for item, name in prompt.forward.items() if item != "train_logits"}
        if not wanted:
            return
        if prompt.is_left_padded:
            for name in wanted.values():
                self.report.skip(name, "one pass over left-padded rows; the engine aligns rows at the left")
            return
        note = f"images {prompt.images}, {prompt.images_from}" if prompt.images else ""
        engine, length = self.engine, prompt.input_ids.shape[1]
        for item, features in self.towers.items():
            if item in wanted:
                self.report.close(wanted[item], features[prompt.images], note=note)
        alpha = engine.alpha_for(length)
        inv_freq = engine.frequencies(alpha)
        embeds = engine.merged_embeddings(prompt.input_ids, self.features_of(prompt))
        known = {"merged_embeds": embeds.asnumpy()}
        if any(item.startswith(("hidden_", "last_hidden")) for item in wanted):
            states, normed, logits = engine.runner.run("prefill", self.states, embeds, inv_freq)
            known.update({f"hidden_{layer}": state.asnumpy() for layer, state in enumerate(states)})
            known["last_hidden"] = normed.asnumpy()
        else:
            logits = engine.logits(prompt.input_ids, self.features_of(prompt))
        logits = logits.asnumpy()
        known.update(ntk_alpha=np.float32(alpha), inv_freq=inv_freq.asnumpy())
        if any(item.startswith("cache_") for item in wanted):
            known.update(self.cache(prompt))
        for item, name in wanted.items():
            if item == "loss_eval":
                if prompt.labels is None:
                    self.report.skip(name, "there are no labels for this prompt")
                else:
                    self.report.close(name, eval_loss(self.loaded, embeds, prompt.labels, inv_freq))
            elif item in known:
                padded = prompt.is_padded and known[item].ndim > 2
                at = prompt.mask if padded else None
                self.report.close(name, known[item], at=at, note="real tokens" if padded else "")
            elif item in ("logits", "logits_tail", "logits_last_position"):
                shown = logits * prompt.mask[..., None]
                recorded = self.case.outputs[name]
                if item == "logits_tail":
                    shown = shown[:, -recorded.shape[1] :]
                elif item == "logits_last_position":
                    shown = shown[:, -1].reshape(recorded.shape)
                self.report.close(name, shown)
        compare_top_values(self.report, wanted, logits)

    def cache(self, prompt: Prompt) -> dict[str, np.ndarray]:
        """Compares the keys and values of every layer after prefill, (batch, length, heads, head_dim)."""
        length = prompt.input_ids.shape[1]
        self.answer(prompt.input_ids.tolist(), self.features_of(prompt), num_tokens=1)
        found = {}
        for layer, cache in enumerate(self.engine.caches):
            for kind, buffer in (("key", cache.key), ("value", cache.value)):
                found[f"cache_{kind}_{layer}"] = buffer.asnumpy()[:, :, :length].transpose(0, 2, 1, 3)
        return found

    def num_steps(self, prompt: Prompt) -> int:
        return self.case.outputs[prompt.generation["ids"]].shape[-1] if "ids" in prompt.generation else 0

    def compare_generation(self, prompt: Prompt) -> None:
        """Compares greedy tokens and the logits of each, without a stop condition."""
        if "ids" not in prompt.generation:
            return
        steps = self.num_steps(prompt)
        config = self.engine.config
        if prompt.is_left_padded and config.use_logn_attn:
            if prompt.input_ids.shape[1] + steps > config.training_length:
                for name in prompt.generation.values():
                    self.report.skip(name, "left padding moves the slots that LogN depends on")
                return
        rows = prompt.rows()
        slots = self.answer(rows, self.features_of(prompt), num_tokens=steps)
        ids = np.array([slot.new_ids for slot in slots], np.int32)
        recorded_logits = np.stack(self.engine.recorded)
        for item, name in prompt.generation.items():
            if item == "ids":
                self.report.close(name, ids, note=f"images {prompt.images}" if prompt.images else "")
            elif item == "logits":
                self.report.close(name, recorded_logits)
            elif item == "ntk_alpha":
                self.report.close(name, np.float32(slots[0].alpha))
        compare_top_values(self.report, prompt.generation, recorded_logits)
        if self.pictures and self.pictures.tokenizer and len(rows) == 1:
            text = AnswerText((), (), self.pictures.tokenizer.text_decoder())
            for token in ids[0].tolist():
                text.reason_after(token)
            text.end()
            self.pictures.compare_text(self.report, prompt.input_ids[0].tolist(), ids[0].tolist(), text)

    def answer(self, rows: list[list[int]], features: Tensor | None, *, num_tokens: int) -> list[Slot]:
        """Greedy answers to all rows at once, whose pictures follow each other in `features`."""
        engine = self.engine
        engine.resize(len(rows))
        return engine.complete(
            [
                Request(ids=ids, features=of_row, options=GenerationConfig(max_new_tokens=num_tokens))
                for ids, of_row in zip(rows, features_of_rows(rows, features, engine.placeholder_id), strict=True)
            ]
        )


def features_of_rows(rows: list[list[int]], features: Tensor | None, placeholder_id: int) -> list[Tensor | None]:
    """The feature rows of each prompt, from those of all pictures (N, T, hidden)."""
    if features is None:
        return [None] * len(rows)
    flat = features.reshape((-1, features.shape[-1]))
    ends = np.cumsum([0, *(list(ids).count(placeholder_id) for ids in rows)]).tolist()
    return [flat[start:end] if end > start else None for start, end in itertools.pairwise(ends)]


def read_language(case: Case, report: Report, mode: str) -> None:
    LanguageReader(case, report, mode).read()
