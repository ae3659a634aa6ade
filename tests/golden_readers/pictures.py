"""The images of a case: arrays among the inputs, or files that the production processor reads."""

import numpy as np

from mindvlm.generation.answer import AnswerText
from mindvlm.models.vary.model_config import VaryModelConfig
from mindvlm.models.vary.processor import VaryProcessor, VaryProcessorConfig
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.text.chat_template import ChatTemplate
from tests.golden_readers.case import Case
from tests.golden_readers.readme_rules import sampled_slice
from tests.golden_readers.report import PIXEL_BOUND, Report


class PictureInputs:
    """The pixels of all images of a case: (N, 3, height, width) float32 for each tower, in the model's order."""

    tokenizer = None

    def __init__(self, *pixels: np.ndarray):
        self.pixels = pixels

    def compare(self, report: Report) -> None:
        """Compares nothing: the arrays are inputs."""

    def compare_text(self, report: Report, input_ids: list[int], ids: list[int], stop: AnswerText) -> None:
        """Compares nothing: the case has no text."""


class ProcessedPictures(PictureInputs):
    """Image files and the prompt of text.json, processed by the production processor."""

    def __init__(self, case: Case, config: VaryModelConfig):
        self.case = case
        self.text = case.documents.get("text.json", {})
        self.template, self.messages = parse_prompt(self.text.get("prompt", ""), ImageSpan(config.image_token_len))
        self.processor = VaryProcessor(
            VaryProcessorConfig(
                vocab_file=str(case.vocabulary() or case.folder / "vocabulary.tiktoken"),
                vocab_size=config.language_model.vocab_size,
                template=self.template.name,
                num_image_tokens=config.image_token_len,
                clip=ImageBranchConfig(size=config.vision_tower.image_size, resize="crop"),
                high=ImageBranchConfig(size=config.vision_vocabulary.image_size, resize="squash"),
            )
        )
        self.tokenizer = self.processor.tokenizer
        pixels = [self.processor.pixels(path) for path in case.pictures()]
        super().__init__(np.stack([one.clip for one in pixels]), np.stack([one.high for one in pixels]))

    def compare(self, report: Report) -> None:
        """Compares `pixel_values_clip`, `pixel_values_high` and the sampled `pixel_values_high_sample`."""
        sampled = sampled_slice(self.case.meaning("pixel_values_high_sample"))
        clip, high = self.pixels
        known = {"pixel_values_clip": clip, "pixel_values_high": high}
        if sampled:
            known["pixel_values_high_sample"] = high[:, :, sampled, sampled]
        for name, pixels in known.items():
            recorded = self.case.outputs.get(name)
            if recorded is not None:
                report.close(name, pixels[0] if recorded.ndim == 3 else pixels, bound=PIXEL_BOUND)
        self.compare_prompt(report)

    def compare_prompt(self, report: Report) -> None:
        """Compares the prompt's text and ids, built from question and images as in `chat`."""
        if "prompt" not in self.text:
            return
        *earlier, query = self.messages
        history = list(zip(earlier[::2], earlier[1::2], strict=True))
        prompt = self.processor.prompt(query, num_images=len(self.pixels[0]), history=history)
        report.same("text.json prompt", [("prompt", prompt.text, self.text["prompt"])])
        if "input_ids" in self.case.inputs:
            ids = self.case.inputs["input_ids"][0].tolist()
            report.same("inputs.npz input_ids", [("input_ids", prompt.input_ids, ids)], note="from the prompt's text")

    def compare_text(self, report: Report, input_ids: list[int], ids: list[int], stop: AnswerText) -> None:
        """Compares the generated ids and texts of text.json."""
        shown = {
            "generated_ids": ids,
            "generated_text": self.tokenizer.decode(ids),
            "generated_text_skip_special": stop.text,
        }
        for key, value in self.text.items():
            if key in shown:
                report.same(f"text.json {key}", [(key, shown[key], value)])
            elif key != "prompt":
                report.skip(f"text.json {key}", "no rule of this reader for an entry of this name")


def picture_inputs(case: Case, config: VaryModelConfig) -> PictureInputs | None:
    """Returns the images of the case; None without vision towers or without images."""
    if config.language_model is None or config.vision_vocabulary is None:
        return None
    arrays = ("pixel_values_high",) if config.is_tiny else ("pixel_values_clip", "pixel_values_high")
    if all(name in case.inputs for name in arrays):
        return PictureInputs(*(case.inputs[name].astype(np.float32) for name in arrays))
    return ProcessedPictures(case, config) if case.pictures() and not config.is_tiny else None


def parse_prompt(prompt: str, span: ImageSpan) -> tuple[ChatTemplate, list[str]]:
    """Returns the chatml template of a prompt that ends with the assistant's open turn, and its messages.

    Images in the messages are `<image>` marks.
    """
    for template in TEMPLATES.values():
        system = template.system_prefix + template.system + template.separator if template.system else ""
        if template.style != "chatml" or not prompt.startswith(system + template.roles[0]):
            continue
        *turns, _ = prompt.removeprefix(system).replace(span.text, IMAGE_MARKER).split(template.separator)
        return template, [turn.removeprefix(template.roles[k % 2]) for k, turn in enumerate(turns)]
    return TEMPLATES["mpt"], [IMAGE_MARKER]
