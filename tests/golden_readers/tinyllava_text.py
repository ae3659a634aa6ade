"""Cases of TinyLLaVA's text: tokenizers, templates, label masks, batches, stopping and the order of samples."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.processor import IMAGE_END, IMAGE_START, image_marks, siglip_branch
from mindvlm.models.tinyllava.records import RECORD_FORMATS
from mindvlm.models.tinyllava.templates import LABEL_RULES, TEMPLATES, image_turns
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.llava_samples import image_to_front, llava_sample
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render, render_turn
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.training.datasets.grouping import group_by_length, group_by_modality, modality_length
from tests.golden_readers.case import Case
from tests.golden_readers.original_samples import collate
from tests.golden_readers.report import PIXEL_BOUND, Report, relative_error
from tests.golden_readers.tinyllava_vocabularies import Vocabularies
from tests.golden_readers.verdicts import ends_there, is_refused

Entry = dict
LLAVA = RECORD_FORMATS["llava"]
MASKS = "masks.jsonl"
STYLES = {
    "SINGLE": "colon_single",
    "TWO": "colon_pair",
    "MPT": "chatml",
    "LLAMA_2": "instruction",
    "TINY_LLAMA": "tagged",
    "PLAIN": "plain",
}
DEFAULT_MAX_LENGTH = 2048
PICTURE_SIZE = 28
# the original adds so many words for a picture where it does not tell modalities apart
PICTURE_WORDS = 128


def is_tinyllava_text(case: Case) -> bool:
    return (case.folder / "tokenizers").is_dir() and (case.folder / MASKS).exists()


def template_of(name: str) -> ChatTemplate:
    """Returns the template of a recorded name; "(unregistered)" marks those that are in no table of the original."""
    return TEMPLATES[name.removesuffix("(unregistered)")]


class TinyLlavaTextReader:
    """Compares every entry of every file."""

    def __init__(self, case: Case, report: Report, vocabularies: Vocabularies):
        self.case, self.report, self.vocabularies = case, report, vocabularies
        self.samples: dict[str, Entry] = {entry["id"]: entry for entry in case.documents.get("samples.json", ())}

    def read(self) -> None:
        readers = {
            "prompts.json": self.compare_prompts,
            "multimodal_strings.json": self.compare_strings,
            "encode.json": self.compare_encoding,
            "image_prompts.json": self.compare_image_prompts,
            "decode.json": self.compare_decoding,
            "stopping.json": self.compare_stopping,
            "sampler.json": self.compare_sampler,
            "lengths.json": self.compare_lengths,
            "collator.json": self.compare_collator,
            "samples.json": lambda entries: None,
        }
        self.compare_sizes(json.loads((self.vocabularies.source / "info.json").read_text(encoding="utf-8")))
        for name, document in self.case.documents.items():
            if name in readers:
                readers[name](document)
            else:
                self.report.skip(name, "no rule of this reader for a file of this name")
        lines = (self.case.folder / MASKS).read_text(encoding="utf-8").splitlines()
        self.compare_masks([json.loads(line) for line in lines if line.strip()])

    def compare_sizes(self, info: dict[str, Entry]) -> None:
        pairs = []
        for variant, recorded in info.items():
            tokenizer = self.vocabularies.get(variant)
            ours = {"length": len(tokenizer), "eos": tokenizer.special_id(tokenizer.end_token)}
            ours |= {"pad": tokenizer.pad_id, "special_tokens": tokenizer.special_ids}
            if tokenizer.prefix_ids:
                ours["bos"] = tokenizer.prefix_ids[0]
            for key in recorded.keys() & ours.keys():
                wanted = recorded[key]
                kept = {token: ours[key][token] for token in wanted} if isinstance(wanted, dict) else ours[key]
                pairs.append((f"{variant} {key}", kept, wanted))
        self.report.same("tokenizers/info.json", pairs)

    def compare_prompts(self, entries: list[Entry]) -> None:
        fields, prompts, refusals = [], [], []
        for entry in entries:
            template, name = template_of(entry["template"]), entry["template"]
            system = template.system_prefix * (template.style == "chatml") + template.system
            ours = [system, list(template.roles), STYLES.get(entry["sep_style"]), template.separator]
            fields.append((name, ours, [entry["system"], entry["roles"], template.style, entry["sep"]]))
            fields.append((name, list(template.examples), [text for _, text in entry["preset_messages"]]))
            closing = entry["sep2"] if entry["sep2"] is not None else entry["sep"]
            fields.append((name, template.answer_separator, closing))
            for case in entry["cases"]:
                label = f"{name} {case['case']}"
                if "error" in case:
                    refusals.append((label, self.prompt(template, case["messages"]), None))
                else:
                    prompts.append((label, self.prompt(template, case["messages"]), case["prompt"]))
        self.report.same("prompts.json fields", fields)
        self.report.same("prompts.json prompts", prompts)
        self.report.same("prompts.json refused", refusals)

    def prompt(self, template: ChatTemplate, messages: list) -> str | None:
        """Returns the prompt as the original's front ends write it; None if it is refused."""
        turns: list[str | None] = []
        for position, (_, message) in enumerate(messages):
            if not isinstance(message, dict):
                turns.append(message)
            elif position == 0 and not template.examples:
                turns += image_turns(template, image_to_front(IMAGE_MARKER + message["text"]))
            else:
                turns.append(message["text"])
        answer_first = bool(messages) and messages[0][0] == template.roles[1] != template.roles[0]
        try:
            if not answer_first:
                return prompt_text(render(template, turns, empty_leaves_open=True))
            if template.style in ("instruction", "tagged"):
                raise UserError("the assistant cannot begin")
            # closing marks go by the position, whoever speaks
            swapped = replace(template, roles=template.roles[::-1])
            pieces = render(template, [])
            for position, turn in enumerate(turns):
                pieces += render_turn(swapped, turn, is_answer=position % 2 == 1)
            return prompt_text(pieces)
        except UserError:
            return None

    def compare_strings(self, entries: list[Entry]) -> None:
        pairs = []
        for entry in entries:
            record = self.samples[entry["sample"]]
            texts = [turn["value"] for turn in record["conversations"]]
            marks = image_marks(template_of(entry["template"]), entry["mm_use_im_start_end"])
            ours = [image_to_front(text, marks) for text in texts] if "image" in record else texts
            pairs.append((f"{entry['template']} {entry['sample']}", ours, entry["values"]))
        self.report.same("multimodal_strings.json", pairs)

    def compare_encoding(self, entries: list[Entry]) -> None:
        ids, texts = [], []
        for entry in entries:
            for variant, recorded in entry["ids"].items():
                tokenizer, label = self.vocabularies.get(variant), f"{variant} {entry['text']!r}"
                armed = tokenizer.special_ids.keys() - {"<image>"}
                ids.append(
                    (label, tokenizer.prefix_ids + tokenizer.encode(entry["text"], allow_special=armed), recorded)
                )
            for variant, recorded in entry["decoded"].items():
                tokenizer, label = self.vocabularies.get(variant), f"{variant} {entry['text']!r}"
                texts.append((label, tokenizer.decode(entry["ids"][variant], skip_special=True), recorded))
        self.report.same("encode.json ids", ids)
        self.report.same("encode.json decoded", texts)

    def compare_image_prompts(self, entries: list[Entry]) -> None:
        pairs = []
        for entry in entries:
            for variant, recorded in entry["ids"].items():
                tokenizer = self.vocabularies.get(variant)
                ours = tokenizer.prefix_ids + tokenizer.encode(entry["prompt"], allow_special=True)
                pairs.append((f"{variant} {entry['prompt']!r}", ours, recorded))
        self.report.same("image_prompts.json", pairs)

    def compare_decoding(self, entries: list[Entry]) -> None:
        for key, skip_special in (("text", True), ("text_with_special", False)):
            pairs = []
            for number, entry in enumerate(entries):
                tokenizer = self.vocabularies.get(entry["tokenizer"])
                decoder = tokenizer.text_decoder(skip_special=skip_special)
                streamed = "".join(map(decoder.push, entry["ids"])) + decoder.flush()
                whole = tokenizer.decode(entry["ids"], skip_special=skip_special)
                pairs += [(f"{number}", whole, entry[key]), (f"{number} streamed", streamed, entry[key])]
            self.report.same(f"decode.json {key}", pairs)

    def compare_stopping(self, entries: list[Entry]) -> None:
        """Compares stop decisions; the original stops if the last generated ids have just ended every row."""
        pairs = []
        for entry in entries:
            tokenizer = self.vocabularies.get(entry["tokenizer"])
            rows = entry["new_ids"]
            rows = rows if rows and isinstance(rows[0], list) else [rows]
            stops = all(ends_there(tokenizer, entry["keyword"], row) for row in rows)
            pairs.append((f"{entry['tokenizer']} {entry['keyword']} {entry['case']}", stops, entry["stop"]))
        if any(not isinstance(recorded, bool) for _, _, recorded in pairs):
            self.report.skip("stopping.json errors", "the original breaks there; here a row ends on its own")
        self.report.same("stopping.json", [pair for pair in pairs if isinstance(pair[2], bool)])

    def compare_sampler(self, entries: list[Entry]) -> None:
        orders, refused = [], []
        for number, entry in enumerate(entries):
            group = group_by_modality if entry["mode"] == "modality" else group_by_length
            drawn: Iterator[list[int]] = iter(entry.get("permutations_in_call_order", ()))
            make = partial(group, entry["lengths"], batch_size=entry["batch_size"], num_shards=entry["world_size"])
            if "error" not in entry:
                orders.append((str(number), make(permute=lambda size, drawn=drawn: next(drawn)), entry["indices"]))
            elif entry.get("case", "").startswith("only_"):
                # one modality stops the original; here it is grouped by length
                order = make(permute=range)
                refused.append((entry["case"], sorted(order), list(range(len(order)))))
            else:
                refused.append((str(entry.get("case")), is_refused(partial(make, permute=range)), True))
        self.report.same("sampler.json indices", orders)
        self.report.same("sampler.json errors", refused)

    def compare_lengths(self, recorded: Entry) -> None:
        lengths = [modality_length(record, LLAVA) for record in self.samples.values()]
        plain = [length + PICTURE_WORDS if length > 0 else -length for length in lengths]
        pairs = [("modality_lengths", lengths, recorded["modality_lengths"]), ("lengths", plain, recorded["lengths"])]
        self.report.same("lengths.json", pairs)

    def sample(self, entry: Entry, name: str) -> TrainingSample:
        """Builds a sample with the masker that the entry names (default: the template's own)."""
        template = template_of(entry["template"])
        if "masker" in entry:
            template = replace(template, label_rule=LABEL_RULES[entry["masker"]])
        has_marks = bool(entry.get("im_start_end"))
        return llava_sample(
            self.samples[name],
            tokenizer=self.tokenizer(entry),
            template=template,
            max_length=entry.get("max_len", DEFAULT_MAX_LENGTH),
            image_marks=image_marks(template, has_marks),
        )

    def tokenizer(self, entry: Entry) -> Tokenizer:
        more = (IMAGE_START, IMAGE_END) if entry.get("im_start_end") else ()
        return self.vocabularies.get(entry["tokenizer"], more_special_tokens=more, pad_token=entry.get("pad_token"))

    def compare_masks(self, entries: list[Entry]) -> None:
        found: dict[str, list] = {"input_ids": [], "labels": [], "mismatch_warning": [], "refused": []}
        for number, entry in enumerate(entries):
            label = f"line {number + 1}: {entry['template']} {entry['tokenizer']} {entry['sample']}"
            if "error" in entry:
                found["refused"].append((label, is_refused(partial(self.sample, entry, entry["sample"])), True))
                continue
            sample = self.sample(entry, entry["sample"])
            ours = {"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()}
            ours["mismatch_warning"] = bool(sample.warning)
            for key, value in ours.items():
                found[key].append((label, value, entry[key]))
        for key, pairs in found.items():
            self.report.same(f"{MASKS} {key}", pairs)

    def compare_collator(self, entries: list[Entry]) -> None:
        found: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": [], "images_shape": []}
        errors = []
        for number, entry in enumerate(entries):
            max_length = entry.get("max_len", DEFAULT_MAX_LENGTH)
            samples = [self.sample(entry, name) for name in entry["samples"]]
            samples = [
                replace(one, input_ids=one.input_ids[:max_length], labels=one.labels[:max_length]) for one in samples
            ]
            pads_are_text = entry["pad_token_id"] == entry["eos_token_id"]
            batch = collate(samples, pad_id=entry["pad_token_id"], pads_are_text=pads_are_text)
            for key, array in batch.items():
                found[key].append((f"batch {number}", array.tolist(), entry[key]))
            pixels = [self.picture(self.samples[name]) for name in entry["samples"]]
            shape = [len(pixels), *pixels[0].shape]
            found["images_shape"].append((f"batch {number}", shape, entry["images_shape"]))
            sums = np.array([one.sum(dtype=np.float64) for one in pixels])
            errors.append(relative_error(sums, np.array(entry["images_sum"])))
        for key, pairs in found.items():
            self.report.same(f"collator.json {key}", pairs)
        close = [("sums", error <= PIXEL_BOUND, True) for error in errors]
        self.report.same("collator.json images_sum", close, note=f"largest error {max(errors, default=0.0):.1e}")

    def picture(self, record: Entry) -> np.ndarray:
        """Returns the pixels of a record, zeros without an image."""
        if "image" not in record:
            return np.zeros((3, PICTURE_SIZE, PICTURE_SIZE), np.float32)
        return siglip_branch(PICTURE_SIZE).pixels(load_image(self.case.folder / "images" / record["image"]))


def read_tinyllava_text(case: Case, report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        TinyLlavaTextReader(case, report, Vocabularies(case.folder / "tokenizers", Path(scratch))).read()
