"""Cases of text: strings, ids, chat prompts, training labels and padded batches, distinguished by their keys."""

from collections.abc import Callable

import numpy as np

from mindvlm.models.vary.processor import VaryProcessor, VaryProcessorConfig
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.images.image_span import ImageSpan
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.text.chat_template import get_template, prompt_text, render
from mindvlm.processing.text.tokenizer import END_OF_TEXT
from tests.golden_readers.case import Case
from tests.golden_readers.original_samples import collate, original_sample
from tests.golden_readers.report import Report

Entry = dict
PADDED = ("input_ids", "labels", "attention_mask")
# the template of the conversation dataset
TRAINING_TEMPLATE = "mpt"


def is_batch(document: object) -> bool:
    return isinstance(document, dict) and "records" in document


def is_entries(document: object) -> bool:
    """Returns whether this is a list with an entry of a kind that this module compares."""
    forms = ({"record", "model_max_length"}, {"turns", "template", "prompt"}, {"ids", "decoded"}, {"ids", "text"})
    return isinstance(document, list) and any(
        isinstance(entry, dict) and any(form <= entry.keys() for form in forms) for entry in document
    )


def has_known_form(document: object) -> bool:
    """Returns whether `read_text` compares this JSON file."""
    return is_batch(document) or is_entries(document)


class TextReader:
    """Compares every entry of every JSON file of a case."""

    def __init__(self, case: Case, report: Report):
        self.case, self.report = case, report
        vocabulary = case.vocabulary()
        self.tokenizer = open_tokenizer(str(vocabulary))
        self.processor = VaryProcessor(VaryProcessorConfig(vocab_file=str(vocabulary)))

    def read(self) -> None:
        for name, document in self.case.documents.items():
            if is_batch(document):
                self.compare_batch(name, document)
            elif is_entries(document):
                self.compare_entries(name, document)
            else:
                self.report.skip(name, "no rule of this reader for a file of this form")

    def compare_entries(self, name: str, entries: list[Entry]) -> None:
        keys = {key for entry in entries for key in entry}
        if "record" in keys:
            samples = [self.sample(entry) for entry in entries]
            compute: dict[str, Callable[[int], object]] = {
                "input_ids": lambda k: samples[k].input_ids.tolist(),
                "labels": lambda k: samples[k].labels.tolist(),
                "warning": lambda k: samples[k].warning,
                "has_image": lambda k: bool(samples[k].images),
                "n_kept": lambda k: samples[k].num_learned,
            }
            given = {"name", "record", "model_max_length", "sep_image_conv_front"}
        elif "turns" in keys:
            compute = {
                "prompt": lambda k: self.prompt(entries[k]),
                "ids": lambda k: self.tokenizer.encode(self.prompt(entries[k]), allow_special=True),
            }
            given = {"name", "template", "turns"}
        else:
            compute = {
                "decoded": lambda k: self.tokenizer.decode(entries[k]["ids"]),
                "decoded_skip_special": lambda k: self.tokenizer.decode(entries[k]["ids"], skip_special=True),
            }
            given = {"name", "text"} | (set() if "text" in keys else {"ids"})
            if "text" in keys:
                compute["ids"] = lambda k: self.tokenizer.encode(entries[k]["text"], allow_special=True)
        for key in sorted(keys - given):
            if key not in compute:
                self.report.skip(f"{name} {key}", "no rule of this reader for an entry of this name")
                continue
            pairs = [
                (str(entry.get("name", k)), compute[key](k), entry[key])
                for k, entry in enumerate(entries)
                if entry.get(key) is not None
            ]
            self.report.same(f"{name} {key}", pairs)

    def prompt(self, entry: Entry) -> str:
        """Returns the prompt as the original builds it: an empty message leaves the turn open."""
        return prompt_text(render(get_template(entry["template"], TEMPLATES), entry["turns"], empty_leaves_open=True))

    def sample(self, entry: Entry) -> TrainingSample:
        return original_sample(
            entry["record"],
            tokenizer=self.tokenizer,
            template=get_template(entry.get("template", TRAINING_TEMPLATE), TEMPLATES),
            image_span=ImageSpan(self.processor.config.num_image_tokens),
            max_length=entry["model_max_length"],
            image_in_front=entry.get("sep_image_conv_front", False),
        )

    def compare_batch(self, name: str, document: Entry) -> None:
        """Compares a padded batch of entries of another file of the case."""
        entries = {
            entry["name"]: entry
            for other in self.case.documents.values()
            if isinstance(other, list)
            for entry in other
            if isinstance(entry, dict) and "record" in entry and "name" in entry
        }
        absent = [record for record in document["records"] if record not in entries]
        if absent:
            self.report.skip(name, f"its record {absent[0]!r} is in no file of the case")
            return
        samples = [self.sample(entries[record]) for record in document["records"]]
        batch = collate(samples, pad_id=self.tokenizer.special_id(END_OF_TEXT))
        for key, value in document.items():
            if key in PADDED:
                self.report.same(f"{name} {key}", [(key, batch[key].tolist(), value)])
            elif key == "images_shapes":
                self.compare_shapes(f"{name} {key}", samples, value)
            elif key == "text_only_image_is_zero":
                self.report.skip(f"{name} {key}", "rows without an image get no zero image here, the splice needs none")
            elif key != "records":
                self.report.skip(f"{name} {key}", "no rule of this reader for an entry of this name")

    def compare_shapes(self, name: str, samples: list[TrainingSample], recorded: list) -> None:
        """Returns the pixel shapes of the rows with images, if the image files are available."""
        folders = [self.case.folder, *sorted(self.case.folder.resolve().parent.iterdir())]
        pairs = []
        for row, sample in enumerate(samples):
            paths = [next((f / image for f in folders if (f / image).is_file()), None) for image in sample.images]
            if None in paths:
                self.report.skip(name, f"the picture {sample.images[0]!r} is not in a folder beside the case")
                return
            if paths:
                pixels = [self.processor.pixels(path) for path in paths]
                shapes = [
                    list(np.stack(arrays).shape) for arrays in zip(*(vars(p).values() for p in pixels), strict=True)
                ]
                pairs.append((f"row {row}", shapes, recorded[row]))
        self.report.same(name, pairs, note="rows with an image")


def read_text(case: Case, report: Report) -> None:
    TextReader(case, report).read()
