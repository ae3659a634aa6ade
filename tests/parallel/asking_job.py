"""Asks models that lie in a folder: msrun ... asking_job.py <folder> <mode> <names>; without msrun one process asks.

Every rank writes what it computed to `<name>-<number of processes>-<rank>.npz`.
"""

import sys
from pathlib import Path

from mindvlm.parallel.launch import ends_all_ranks, limit_threads

QUESTIONS = ("What is in the picture?", "And now in a few words: is it large?", "Count to three.")
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}


def main(folder: Path, mode: str, names: list[str]) -> None:
    import numpy as np

    import mindvlm
    from tests.tiny_vary import picture

    for name in names:
        found = [*(folder / name).glob("*.yaml"), folder / name / "model"]
        adapter = folder / name / "adapter"
        model = mindvlm.load(found[0], mode=mode, device="cpu", adapter=adapter if adapter.exists() else None)
        image = picture(1, (90, 60))
        answers = model.generate(list(QUESTIONS), [image, image, None], max_new_tokens=6)
        answers.append(model.chat(QUESTIONS[0], image, max_new_tokens=6, **SAMPLED))
        arrays = {f"ids_{number}": np.array(answer.ids) for number, answer in enumerate(answers)}
        arrays["logits"] = model.logits(QUESTIONS[1], image)
        caches = model.engine.caches.get_parameters()
        arrays |= {"weights": weight_bytes(model.model), "cache": sum(p.nbytes for p in caches)}
        mesh = model.mesh
        np.savez(folder / f"{name}-{mesh.tp}-{mesh.rank}.npz", **arrays)


def weight_bytes(model) -> int:
    """Returns the size of all weights, those in memory of the kernels included."""
    from mindvlm.nn.products import WeightProduct

    products = [cell for _, cell in model.cells_and_names() if isinstance(cell, WeightProduct)]
    in_products = {id(parameter) for product in products for parameter in product.get_parameters()}
    others = [parameter for parameter in model.get_parameters() if id(parameter) not in in_products]
    return sum(one.num_bytes for one in products) + sum(one.nbytes for one in others)


if __name__ == "__main__":
    limit_threads()
    with ends_all_ranks():
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
