"""Cases of a published checkpoint folder: from files and images to the answer, by the production loader."""

import re
from pathlib import Path

import numpy as np
from mindspore import Tensor

import mindvlm
from mindvlm.models.tinyllava.processor import TinyLlavaProcessor
from tests.golden_readers import kernels
from tests.golden_readers.case import Case
from tests.golden_readers.loaded import RecordingEngine
from tests.golden_readers.report import FORWARD_BOUND, Report
from tests.golden_readers.tinyllava import VisionStates
from tests.golden_readers.tinyllava_loops import LoopQuestion, compare_loops
from tests.golden_readers.tinyllava_scenario import PLACEHOLDER

EXPECTED, TOWER = "expected.json", "vision_config.json"
# what the README says of `*_sub` arrays: every 27th token, every 97th position
TOKEN_STEP, POSITION_STEP = 27, 97


def checkpoint_folder(case: Case) -> Path | None:
    """Returns the folder of the case that contains a checkpoint."""
    found = [path for path in sorted(case.folder.iterdir()) if (path / "config.json").is_file()]
    return found[0] if len(found) == 1 else None


def is_checkpoint_folder(case: Case) -> bool:
    return "quick_start" in case.documents.get(EXPECTED, {}) and checkpoint_folder(case) is not None


class FolderReader:
    """Asks every recorded question and compares the answers."""

    def __init__(self, case: Case, report: Report, mode: str):
        self.case, self.report = case, report
        self.expected = case.documents[EXPECTED]
        tower = case.folder / TOWER
        options = {"vision_tower": tower} if tower.exists() else {}
        # the tower's and the model's own 16-bit values, or MindSpore's products
        options["weights"] = "float32" if kernels.in_use == "off" else "auto"
        self.loaded = mindvlm.load(checkpoint_folder(case), mode=mode, device="cpu", cache=False, **options)
        # the same engine, which keeps the logits
        self.loaded.engine.__class__ = RecordingEngine
        self.vision = VisionStates(self.loaded.model)

    def read(self) -> None:
        config = self.loaded.config
        rows = self.loaded.model.language_model.embed_tokens.product.shape[0]
        pairs = [
            ("vocab_after_load", rows, self.expected["vocab_after_load"]),
            ("len_tokenizer", self.loaded.processor.tokenizer.vocab_size, self.expected["len_tokenizer"]),
        ]
        self.report.same(EXPECTED, pairs)
        self.report.skip("context_len", "the original's max_sequence_length or 2048, which nothing there obeys")
        for number, entry in enumerate(self.expected["quick_start"]):
            if entry["conv_mode"] != config.processor.template:
                self.report.fail(f"q{number} conv_mode", f"{config.processor.template}, not {entry['conv_mode']}")
            self.compare(f"q{number}", entry)
        compare_loops(self.case.folder / "loops", self.report, self.ask)

    def ask(self, question: LoopQuestion) -> str:
        """Returns the answer of a loop, limited to the length stated in the README."""
        stated = re.search(r"at most (\d+) new tokens", self.case.readme)
        longest = max(len(entry["new_ids"]) for entry in self.expected["quick_start"])
        image = self.picture(question.image) if isinstance(question.image, str) else question.image
        return str(self.loaded.chat(question.query, image, max_new_tokens=int(stated.group(1)) if stated else longest))

    def picture(self, name: str) -> Path:
        """Returns the file of an image, named with or without suffix, in the folder that the README names."""
        name = Path(name).stem
        beside = self.case.folder.resolve().parent
        stated = re.search(r"`\.\./([\w-]+)/", self.case.readme)
        return next(beside.glob(f"{stated.group(1) if stated else '*'}/{name}.*"))

    def compare(self, query: str, entry: dict) -> None:
        processor: TinyLlavaProcessor = self.loaded.processor
        inputs = processor(entry["query"], [self.picture(name) for name in entry["images"]])
        ids = np.array([inputs.input_ids], np.int32)
        short = [token for token in inputs.input_ids if token != PLACEHOLDER]
        text = [token for token in entry["input_ids"] if token != PLACEHOLDER]
        _, _, features, connected = self.vision(Tensor(inputs.pixels))
        embeds = self.loaded.engine.merged_embeddings(ids, connected)
        logits = self.loaded.engine.logits(ids, connected).asnumpy()
        answer = self.loaded.generate(
            entry["query"], [self.picture(name) for name in entry["images"]], max_new_tokens=len(entry["new_ids"])
        )
        pairs = [
            ("prompt ids", short, text),
            ("merged_length", len(inputs.input_ids), entry["merged_length"]),
            ("new_ids", list(answer.ids), entry["new_ids"]),
            ("printed", str(answer), entry["printed"]),
        ]
        self.report.same(f"{query} {EXPECTED}", pairs)
        known = {
            "features_sub": features.asnumpy()[:, ::TOKEN_STEP],
            "connector_sub": connected.asnumpy()[:, ::TOKEN_STEP],
            "merged_sub": embeds.asnumpy()[:, ::TOKEN_STEP],
            "logits_last": logits[:, -1],
            "logits_sub": logits[:, ::POSITION_STEP],
            "step_logits": np.stack(self.loaded.engine.recorded, 1)[:, : len(entry["new_ids"])],
        }
        for item, array in known.items():
            if f"{query}.{item}" in self.report.recorded:
                self.report.close(f"{query}.{item}", array)
        axes = (2, 3)
        self.compare_sum(f"{query}.pixel_channel_sum", inputs.pixels, axes)
        self.compare_sum(f"{query}.features_sum", features.asnumpy(), (1, 2))

    def compare_sum(self, name: str, array: np.ndarray, axes: tuple[int, ...]) -> None:
        """Compares a sum relative to the sum of the absolute values, because a sum may be small beside its terms."""
        if name in self.report.recorded:
            recorded = self.report.recorded[name]
            difference = np.abs(array.sum(axes, dtype=np.float64) - recorded).max()
            error = float(difference / np.abs(array).sum(axes, dtype=np.float64).min())
            self.report.check(name, error, bound=FORWARD_BOUND)


def read_checkpoint_folder(case: Case, report: Report, mode: str) -> None:
    FolderReader(case, report, mode).read()
