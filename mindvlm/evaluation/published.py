"""Published figures of the families' papers and model cards, by benchmark.

TinyLLaVA: arXiv 2402.14289 and its model zoo; SliME: arXiv 2406.08487, tables 1 and 2; Vary-toy: arXiv 2401.12503;
Vary: arXiv 2312.06109; page OCR of both: arXiv 2409.01704; LLaVA-1.5: arXiv 2310.03744.
"""

# the order of the columns below
_TINYLLAVA = ("llava-bench-wild", "mme", "mmbench", "mm-vet", "scienceqa", "vqav2", "gqa", "textvqa", "pope")
_SLIME = (
    "textvqa", "gqa", "vqav2", "mmbench", "mmbench-cn", "mmmu", "llava-bench-wild", "mme", "mm-vet", "mathverse",
    "mathvista", "mathvision", "scienceqa", "pope", "amber",
)  # fmt: skip
_ROWS = {
    "TinyLLaVA-3.1B": (_TINYLLAVA, (75.8, 1464.9, 66.9, 32.0, 69.1, 79.9, 62.0, 59.1, 86.4)),
    "TinyLLaVA-2.0B": (_TINYLLAVA, (66.4, 1433.8, 63.3, 32.6, 64.7, 78.9, 61.9, 56.4, 86.5)),
    "TinyLLaVA-1.5B": (_TINYLLAVA, (60.8, 1276.5, 55.2, 25.8, 60.3, 76.9, 60.3, 51.7, 86.1)),
    "LLaVA-1.5-7B": (_TINYLLAVA, (63.4, 1510.7, 64.3, 30.5, 66.8, 78.5, 62.0, 58.2, 85.9)),
    "SliME-7B": (
        _SLIME, (64.39, 63.13, 80.32, 69.32, 61.85, 37.2, 76.1, 1544, 35.4, 17.5, 37.5, 16.12, 76.8, 85.4, 87.8),
    ),
    "SliME-8B": (
        _SLIME, (64.76, 63.94, 80.69, 75.0, 71.8, 41.2, 73.9, 1578, 37.4, 22.9, 43.3, 16.78, 84.18, 86.0, 88.9),
    ),
    "SliME-8B LoRA": (
        _SLIME, (65.26, 63.94, 80.79, 75.42, 70.96, 40.8, 64.9, 1573, 36.8, 21.8, 43.6, 16.12, 84.13, 86.0, 90.1),
    ),
    "SliME-13B": (
        _SLIME, (66.11, 63.6, 80.43, 71.13, 65.2, 38.0, 73.1, 1606, 41.2, 19.0, 40.8, 18.09, 80.17, 86.3, 89.4),
    ),
    "Vary-toy": (("docvqa", "chartqa", "refcoco", "mm-vet", "page-ocr"), (65.6, 59.1, 88.1, 29.0, 0.082)),
    "Vary-7B": (("docvqa", "chartqa", "mm-vet", "page-ocr"), (78.2, 65.3, 36.2, 0.092)),
}  # fmt: skip


def published(benchmark: str) -> dict[str, float]:
    """Returns model -> published figure of a benchmark; of several splits, that of the default one."""
    return {
        model: dict(zip(names, values, strict=True))[benchmark]
        for model, (names, values) in _ROWS.items()
        if benchmark in names
    }
