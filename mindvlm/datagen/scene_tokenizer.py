"""The vocabulary of a model of drawn scenes: byte-level BPE, trained on captions and questions."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mindvlm.datagen.dataset import write_file
from mindvlm.datagen.scene_data import DESCRIBE, SHORT_ANSWER
from mindvlm.datagen.scene_questions import KINDS
from mindvlm.datagen.scenes import description, random_scene

VOCAB_SIZE = 512
NUM_SCENES = 2000
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json. The same call writes the same files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    settings |= {"pad_token": "<pad>", "add_bos_token": False, "clean_up_tokenization_spaces": False}
    write_file(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def corpus() -> list[str]:
    """Returns texts as they stand in prompts: questions after a line break, answers after a space."""
    rng = np.random.default_rng(0)
    texts = [f" {DESCRIBE}", "USER:", " ASSISTANT:", SHORT_ANSWER] * NUM_SCENES
    for _ in range(NUM_SCENES):
        scene = random_scene(rng)
        texts += [description(scene), f" {description(scene)}"]
        for ask in KINDS.values():
            questions = list(ask(scene))
            for number in rng.integers(len(questions), size=min(len(questions), 4)).tolist():
                question = questions[number]
                texts += ["\n" + question.text, " " + question.answer, question.statement, " " + question.statement]
    return texts
