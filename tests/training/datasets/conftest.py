"""A small data set on disk and a processor for it."""

import json
from functools import partial

import pytest
import yaml
from PIL import Image

from mindvlm.models.vary.processor import VaryProcessor, VaryProcessorConfig
from mindvlm.models.vary.tokenizer import COMPACT_SPECIAL_TOKENS
from mindvlm.processing.images.image_branch import ImageBranchConfig
from tests.processing.text.small_vocabulary import write_rank_file


@pytest.fixture(scope="session")
def make_processor(tmp_path_factory):
    """Makes a processor with pictures of 8 x 16 and 4 x 4 pixels and 4 placeholders; can be pickled."""
    config = VaryProcessorConfig(
        vocab_file=str(write_rank_file(tmp_path_factory.mktemp("vocabulary") / "small.tiktoken")),
        special_tokens=list(COMPACT_SPECIAL_TOKENS),
        system="",
        num_image_tokens=4,
        clip=ImageBranchConfig(size=4, resize="squash"),
        high=ImageBranchConfig(size=[8, 16], resize="squash"),
    )
    return partial(VaryProcessor, config)


def conversation(*values: str, image: str | None = None) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def registry(tmp_path):
    """A registry of "pages" (40 records with pictures, of which number 7 is broken and 8 missing) and "talk" (9)."""
    folder = tmp_path / "mixed data" / "页 images"
    folder.mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (20 + i, 10), (i, 2 * i, 200)).save(folder / f"页 {i}.png")
    whole = (folder / "页 7.png").read_bytes()
    (folder / "页 7.png").write_bytes(whole[: len(whole) // 2])
    (folder / "页 8.png").unlink()
    pages = [conversation("<image>\nRead.", f"page {i}", image=f"页 {i}.png") for i in range(40)]
    (folder.parent / "pages.json").write_text(json.dumps(pages, ensure_ascii=False, indent=1), encoding="utf-8")
    talk = [json.dumps(conversation(f"question {i}", "yes", "why?", f"because {i}")) for i in range(9)]
    (folder.parent / "talk.jsonl").write_text("\n".join(talk), encoding="utf-8")
    entries = {
        "pages": {"images": "页 images", "annotations": "pages.json"},
        "talk": {"annotations": "talk.jsonl", "weight": 2.0},
    }
    path = folder.parent / "registry.yaml"
    path.write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf-8")
    return path
