"""Cases of SliME's text: prompts, ids, label masks, batches and the separator."""

import json
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mindvlm.models.slime.processor import SlimeProcessor, SlimeProcessorConfig
from mindvlm.models.slime.templates import TEMPLATES, TEXT_END, TURN_END, llama3_prompt
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.llava_samples import image_to_front
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render
from mindvlm.processing.text.tokenizer import Tokenizer
from tests.golden_readers.case import Case, read_arrays
from tests.golden_readers.original_samples import collate
from tests.golden_readers.report import Report
from tests.golden_readers.verdicts import is_refused

CASES, PROMPTS, IMAGE_TOKENS = "train_cases.json", "prompts.json", "image_token_cases.json"
COLLATED = "__collated__"
SETTINGS = {
    "v1": {"tokenizer_class": "LlamaTokenizer"},
    "l3": {"bos_token": "<|begin_of_text|>", "eos_token": TURN_END, "pad_token": TEXT_END},
}


def is_slime_text(case: Case) -> bool:
    return CASES in case.documents and (case.folder / "tokenizer_v1").is_dir()


class SlimeTextReader:
    """Compares every entry of every file.

    Args:
        scratch: an empty folder for the tokenizers, in the layout of a checkpoint.
    """

    def __init__(self, case: Case, report: Report, scratch: Path):
        self.case, self.report, self.scratch = case, report, scratch

    def read(self) -> None:
        self.compare_prompts(self.case.documents.get(PROMPTS, []))
        self.compare_samples(self.case.documents[CASES])
        self.compare_image_tokens(self.case.documents.get(IMAGE_TOKENS, []))

    def processor(self, tokenizer: str, legacy: bool | None, template: str) -> SlimeProcessor:
        folder = self.scratch / f"{tokenizer}.{legacy}"
        if not folder.exists():
            folder.mkdir()
            name = "tokenizer_nonlegacy.json" if legacy is False else "tokenizer.json"
            shutil.copyfile(self.case.folder / f"tokenizer_{tokenizer}" / name, folder / "tokenizer.json")
            settings = SETTINGS[tokenizer] | ({} if legacy is None else {"legacy": legacy})
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return SlimeProcessor(SlimeProcessorConfig(tokenizer=str(folder), template=template))

    def compare_prompts(self, entries: list[dict]) -> None:
        fields, prompts, others = [], [], set()
        for number, entry in enumerate(entries):
            if entry["template"] not in TEMPLATES:
                others.add(entry["template"])
                continue
            template, label = TEMPLATES[entry["template"]], f"{number} {entry['template']}"
            turns = [turn for round_ in entry["turns"] for turn in round_]
            prompts.append((label, original_prompt(template, turns), entry["prompt"]))
            if template.style == "colon_pair":
                ours = [template.system, list(template.roles), template.separator, template.answer_separator]
                fields.append((label, ours, [entry[key] for key in ("system", "roles", "sep", "sep2")]))
        self.report.same(f"{PROMPTS} fields", fields)
        self.report.same(f"{PROMPTS} prompts", prompts)
        if others:
            self.report.skip(f"{PROMPTS} {', '.join(sorted(others))}", "no SliME was trained with these templates")

    def compare_samples(self, rows: list[dict]) -> None:
        found: dict[str, list] = {
            key: [] for key in ("normalised", "prompt", "input_ids", "labels", "mismatch_warning", "error")
        }
        batch: dict[str, TrainingSample] = {}
        arrays = read_arrays(self.case.folder / "collated.npz")
        for row in rows:
            if row["name"] == COLLATED:
                self.compare_batch(row, [batch[name] for name in row["order"]], arrays)
                batch = {}
                continue
            label = f"{row['name']} {row['template']} {row['tokenizer']} {row['legacy']} {row['model_max_length']}"
            processor = self.processor(row["tokenizer"], row["legacy"], row["template"])
            record = {"conversations": row["conversations"]} | ({"image": "picture.png"} if row["has_image"] else {})
            build = partial(processor.original_sample, record, max_length=row["model_max_length"])
            if "error" in row:
                found["error"].append((label, is_refused(build), True))
                continue
            sample = batch[row["name"]] = build()
            ours = {
                "input_ids": sample.input_ids.tolist(),
                "labels": sample.labels.tolist(),
                "mismatch_warning": bool(sample.warning),
            }
            if row["has_image"]:
                texts = [image_to_front(turn["value"]) for turn in row["conversations"]]
                ours["normalised"] = texts
                row = {**row, "normalised": [turn["value"] for turn in row["normalised"]]}
            for key, value in ours.items():
                found[key].append((label, value, row[key]))
            if row["template"] != "plain":
                turns = [turn["value"] for turn in row["conversations"]]
                turns = turns[1:] if row["conversations"][0]["from"] == "gpt" else turns
                turns = list(map(image_to_front, turns)) if row["has_image"] else turns
                found["prompt"].append((label, original_prompt(processor.template, turns), row["prompt"]))
        for key, pairs in found.items():
            self.report.same(f"{CASES} {key}", pairs)

    def compare_batch(self, row: dict, samples: list[TrainingSample], arrays: dict[str, np.ndarray]) -> None:
        """Compares a batch; the collator cuts samples to the limit that its key names."""
        length = int(row["key"].rsplit(".", 1)[1])
        samples = [replace(one, input_ids=one.input_ids[:length], labels=one.labels[:length]) for one in samples]
        batch = collate(samples, pad_id=row["pad_token_id"])
        pairs = [(key, array.tolist(), arrays[f"{row['key']}.{key}"].tolist()) for key, array in batch.items()]
        self.report.same(f"collated.npz {row['key']}", pairs)

    def compare_image_tokens(self, entries: list[dict]) -> None:
        ids, separators = [], []
        for entry in entries:
            tokenizer: Tokenizer = self.processor(entry["tokenizer"], entry.get("legacy"), "v1").tokenizer
            label = f"{entry['tokenizer']} {entry.get('legacy')}"
            if "separator_id" in entry:
                separators.append((label, tokenizer.encode(",")[-1], entry["separator_id"]))
                separators.append((label, tokenizer.vocab_size, entry["vocab_size"]))
                continue
            ours = tokenizer.prefix_ids + tokenizer.encode(entry["prompt"], allow_special=True)
            ids.append((f"{label} {entry['prompt']!r}", ours, entry["input_ids"]))
        self.report.same(f"{IMAGE_TOKENS} ids", ids)
        self.report.same(f"{IMAGE_TOKENS} separator", separators)


def original_prompt(template: ChatTemplate, turns: list[str | None]) -> str:
    """Returns the prompt as the original program builds it."""
    if template.style == "chatml":
        return llama3_prompt(template, turns)
    if template.style == "plain":
        # answers are turns like questions
        return "".join(turn + template.separator for turn in turns if turn)
    return prompt_text(render(template, turns, empty_leaves_open=True))


def read_slime_text(case: Case, report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        SlimeTextReader(case, report, Path(scratch)).read()
