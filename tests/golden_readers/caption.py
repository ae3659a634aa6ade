"""Cases of Vary-tiny's text, in one cases.json: vocabulary, strings, prompts, training labels and a padded batch."""

from collections.abc import Sequence
from functools import partial

from mindvlm.models.vary.processor import VaryProcessor, VaryProcessorConfig
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.text.chat_template import get_template
from tests.golden_readers.case import Case
from tests.golden_readers.original_samples import collate, original_sample
from tests.golden_readers.report import Report

Entry = dict
# the template of the caption dataset and of the demo without text
CAPTION_TEMPLATE = "opt"
BATCH_ARRAYS = ("input_ids", "labels", "attention_mask")
ADDED_TOKENS = {"imgpad_id": "<imgpad>", "img_id": "<img>", "img_end_id": "</img>"}


def is_caption_text(case: Case) -> bool:
    return (case.folder / "merges.txt").exists() and "cases.json" in case.documents


class CaptionTextReader:
    """Compares every entry of cases.json."""

    def __init__(self, case: Case, report: Report):
        self.case, self.report = case, report
        self.document: dict = case.documents["cases.json"]
        self.num_image_tokens = self.count_image_tokens()
        self.processor = self.make_processor(CAPTION_TEMPLATE)
        self.tokenizer = self.processor.tokenizer

    def count_image_tokens(self) -> int:
        """Returns the placeholders of one image, from the first recorded prompt that has an image."""
        for entry in self.document.get("prompts", ()):
            if num_images := entry["prompt"].count("<img>"):
                return entry["prompt"].count("<imgpad>") // num_images
        return 256

    def make_processor(self, template: str) -> VaryProcessor:
        return VaryProcessor(
            VaryProcessorConfig(
                vocab_file=str(self.case.folder / "vocab.json"),
                template=template,
                num_image_tokens=self.num_image_tokens,
                clip=None,
                high=ImageBranchConfig(size=1024, resize="squash"),
            )
        )

    def read(self) -> None:
        readers = {
            "tokenizer_config": self.compare_tokenizer_config,
            "base_vocab": lambda value: self.same("base_vocab", self.tokenizer.num_file_tokens, value),
            "prompts": self.compare_prompts,
            "strings": self.compare_strings,
            "labels": self.compare_labels,
            "collated": self.compare_batch,
        }
        for key, token in ADDED_TOKENS.items():
            readers[key] = partial(self.same, key, self.tokenizer.special_ids.get(token))
        for key, value in self.document.items():
            if key in readers:
                readers[key](value)
            else:
                self.report.skip(f"cases.json {key}", "no rule of this reader for an entry of this name")

    def same(self, name: str, actual: object, recorded: object) -> None:
        self.report.same(f"cases.json {name}", [(name, actual, recorded)])

    def compare_tokenizer_config(self, recorded: dict) -> None:
        tokenizer = self.tokenizer
        known = {
            "bos_token": (tokenizer.prefix_tokens or ("",))[0],
            "eos_token": tokenizer.end_token,
            "pad_token": tokenizer.pad_token,
            "add_bos_token": bool(tokenizer.prefix_tokens),
        }
        pairs = [(key, known[key], value) for key, value in recorded.items() if key in known]
        self.report.same("cases.json tokenizer_config", pairs)

    def compare_strings(self, entries: Sequence[Entry]) -> None:
        encode = partial(self.tokenizer.encode, allow_special=True)
        pairs = [(entry["text"], self.tokenizer.prefix_ids + encode(entry["text"]), entry["ids"]) for entry in entries]
        self.report.same("cases.json strings ids", pairs)

    def compare_prompts(self, entries: Sequence[Entry]) -> None:
        """Returns the text and ids that the production processor makes from an image and a question."""
        texts, ids = [], []
        for entry in entries:
            template, query = parse_prompt(entry["prompt"], ImageSpan(self.num_image_tokens))
            prompt = self.make_processor(template).prompt(query, num_images=query.count(IMAGE_MARKER))
            texts.append((entry["name"], prompt.text, entry["prompt"]))
            ids.append((entry["name"], prompt.input_ids, entry["ids"]))
        self.report.same("cases.json prompts prompt", texts)
        self.report.same("cases.json prompts ids", ids)

    def sample(self, entry: Entry) -> TrainingSample:
        return original_sample(
            entry["record"],
            tokenizer=self.tokenizer,
            template=get_template(CAPTION_TEMPLATE, TEMPLATES),
            image_span=ImageSpan(self.num_image_tokens),
            max_length=entry["model_max_length"],
        )

    def compare_labels(self, entries: Sequence[Entry]) -> None:
        samples = {entry["name"]: self.sample(entry) for entry in entries}
        known = {
            "input_ids": lambda sample: sample.input_ids.tolist(),
            "labels": lambda sample: sample.labels.tolist(),
            "n_kept": lambda sample: sample.num_learned,
        }
        for key, read in known.items():
            pairs = [(entry["name"], read(samples[entry["name"]]), entry[key]) for entry in entries if key in entry]
            self.report.same(f"cases.json labels {key}", pairs)

    def compare_batch(self, recorded: Entry) -> None:
        entries = {entry["name"]: entry for entry in self.document.get("labels", ())}
        samples = [self.sample(entries[name]) for name in recorded["records"]]
        batch = collate(samples, pad_id=self.tokenizer.pad_id)
        for key in BATCH_ARRAYS:
            if key in recorded:
                self.report.same(f"cases.json collated {key}", [(key, batch[key].tolist(), recorded[key])])


def parse_prompt(prompt: str, span: ImageSpan) -> tuple[str, str]:
    """Returns the template of a prompt that ends with the assistant's open turn, and the question with `<image>`."""
    for template in TEMPLATES.values():
        start = template.system + template.separator + template.roles[0] + ": "
        end = template.separator + template.roles[1] + ":"
        if template.style == "colon_pair" and prompt.startswith(start) and prompt.endswith(end):
            question = prompt.removeprefix(start).removesuffix(end)
            return template.name, question.replace(span.text, IMAGE_MARKER)
    return CAPTION_TEMPLATE, prompt.replace(span.text, IMAGE_MARKER)


def read_caption_text(case: Case, report: Report) -> None:
    CaptionTextReader(case, report).read()
