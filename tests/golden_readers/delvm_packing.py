"""Cases of DeLVM's packing: files of codes, packs in their order, batches, and rows of an evaluation."""

import filecmp
import re
import tempfile
from pathlib import Path

import numpy as np

from mindvlm.models.delvm.packing import MIN_LENGTH, MODES, PackedTokens, PackOrder, padded_rows
from mindvlm.models.delvm.token_files import TokenFile, find_token_files, join_lines, write_token_file
from tests.golden_readers.case import Case
from tests.golden_readers.report import Report

VOCAB_SIZE = 8192
SAMPLER = re.compile(r"sampler_world(\d+)_batch(\d+)(?:_ramp([\d-]+))?_rank(\d+)_len")


def is_packing(case: Case) -> bool:
    return "packed_length" in case.config and "samplers" in case.config


def read_packing(case: Case, report: Report) -> None:
    """Compares all lists of each mode, the rows of an evaluation, and the files that are written."""
    paths = find_token_files(case.folder / "data/train")
    files = [TokenFile(path, VOCAB_SIZE) for path in paths]
    for mode in MODES:
        PackingReader(case, report, mode, files).compare()
    for name in [name for name in case.outputs if re.fullmatch(r"valid\..+\.n", name)]:
        compare_evaluation(case, report, name.removesuffix(".n"))
    compare_written(report, paths)
    for name in [name for name in case.outputs if name.startswith("dummy.")]:
        report.skip(name, "a training needs data; there is no random data set")


class PackingReader:
    """Compares the packs of one mode, whose names begin with the mode."""

    def __init__(self, case: Case, report: Report, mode: str, files: list[TokenFile]):
        self.report, self.mode, self.config = report, mode, case.config
        length, width = self.config["packed_length"], self.config["seq_len"]
        options = {"mode": mode, "min_length": self.config["min_length"], "seed": self.config["pack_seed"]}
        self.packed = [PackedTokens(file, length, width, **options) for file in files]

    def compare(self) -> None:
        self.close("n_packs_per_file", [len(packs) for packs in self.packed])
        for number, packs in enumerate(self.packed):
            self.close(f"file{number}.shuffled_order", packs.order)
            self.close(f"file{number}.kept_offsets", packs.file.offsets[packs.kept])
            self.close(f"file{number}.kept_lengths", packs.file.lengths[packs.kept])
            recorded = [name for name in self.names() if re.fullmatch(rf"file{number}\.pack\d+\.input_ids", name)]
            for name in recorded:
                self.compare_pack(name.removesuffix(".input_ids"), packs)
        for name in self.names():
            if match := SAMPLER.fullmatch(name):
                self.compare_order(name.removesuffix("_len"), *match.groups())
        for name in self.names():
            if match := re.fullmatch(r"first_global_batch(\d+)\.input_ids", name):
                self.compare_batch(name.removesuffix(".input_ids"), int(match[1]))

    def compare_pack(self, name: str, packs: PackedTokens) -> None:
        pack = packs[int(name.rpartition("pack")[2])]
        self.close(f"{name}.input_ids", pack.input_ids[None])
        self.close(f"{name}.labels", pack.labels[None])
        self.close(f"{name}.indexes", pack.positions[None])
        self.close(f"{name}.cu_seqlens", pack.cu_seqlens[None])
        # pictures are the only type of data
        self.close(f"{name}.type_ids", np.zeros_like(pack.input_ids)[None])
        if f"{name}.unpacked_input_ids" in self.names():
            ids, labels = pack.rows(self.config["micro_bsz"], self.config["seq_len"])
            self.close(f"{name}.unpacked_input_ids", ids)
            self.close(f"{name}.unpacked_labels", labels)

    def compare_order(self, name: str, world: str, batch: str, growth: str | None, rank: str) -> None:
        order = PackOrder(
            sum(map(len, self.packed)),
            int(batch),
            rank=int(rank),
            num_ranks=int(world),
            growth=tuple(map(int, growth.split("-"))) if growth else None,
            seed=self.config["sampler_seed"],
        )
        for epoch in range(len([one for one in self.names() if re.fullmatch(rf"{name}_epoch\d+", one)])):
            batches = list(order.epoch())
            if epoch == 0:
                self.close(f"{name}_len", len(batches))
            self.close(f"{name}_epoch{epoch}", np.concatenate(batches))
            self.close(f"{name}_epoch{epoch}_batch_sizes", [len(one) for one in batches])

    def compare_batch(self, name: str, batch_size: int) -> None:
        order = PackOrder(sum(map(len, self.packed)), batch_size, seed=self.config["sampler_seed"])
        every = [(packs, number) for packs in self.packed for number in range(len(packs))]
        batch = [every[place][0][every[place][1]] for place in next(order.epoch())]
        self.close(f"{name}.input_ids", [pack.input_ids for pack in batch])
        self.close(f"{name}.labels", [pack.labels for pack in batch])
        self.close(f"{name}.indexes", [pack.positions for pack in batch])
        self.close(f"{name}.type_ids", np.zeros((len(batch), self.config["packed_length"]), np.int32))
        for row, pack in enumerate(batch):
            self.close(f"{name}.cu_seqlens_row{row}", pack.cu_seqlens)

    def close(self, name: str, actual) -> None:
        self.report.close(f"{self.mode}.{name}", np.asarray(actual, np.int32))

    def names(self) -> list[str]:
        """Returns the recorded names of the mode, without it."""
        prefix = f"{self.mode}."
        return [name.removeprefix(prefix) for name in self.report.recorded if name.startswith(prefix)]


def compare_evaluation(case: Case, report: Report, name: str) -> None:
    """Compares the rows of the first sentences that are long enough, and their number."""
    (path,) = find_token_files(case.folder / "data/valid" / name.removeprefix("valid."))
    file = TokenFile(path, VOCAB_SIZE)
    kept = np.flatnonzero(file.lengths >= MIN_LENGTH)
    num_rows = len(report.recorded[f"{name}.input_ids"])
    ids, labels = padded_rows([file[int(line)] for line in kept[:num_rows]], case.config["seq_len"])
    report.close(f"{name}.input_ids", ids)
    report.close(f"{name}.labels", labels)
    report.close(f"{name}.n", np.int32(len(kept)))


def compare_written(report: Report, paths: list[Path]) -> None:
    """Reads the files and writes them again: the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            copy = Path(folder) / f"{number}.bin"
            write_token_file(copy, iter(TokenFile(path, VOCAB_SIZE)))
            compare_bytes(report, f"file{number} written again", copy, path)


def compare_joined(case: Case, report: Report) -> None:
    """Joins the lines of files, and writes files of one line per two pictures: the bytes of the original program."""
    with tempfile.TemporaryDirectory() as folder:
        for expected in sorted((case.folder / "tokens_out").iterdir()):
            source, _, count = expected.name.rpartition("_")
            lines = iter(TokenFile(case.folder / "tokens_in" / source / "train.bin", VOCAB_SIZE))
            joined = list(join_lines(lines, int(count)))
            copy = Path(folder) / f"{expected.name}.bin"
            write_token_file(copy, joined)
            compare_bytes(report, f"concat.{expected.name} file", copy, expected / "train.bin")
            report.close(f"concat.{expected.name}.first_line", np.array(joined[0], np.int32))
            report.close(f"concat.{expected.name}.last_line", np.array(joined[-1], np.int32))
            report.close(f"concat.{expected.name}.meta", np.load(f"{copy}.meta").astype(np.int32))
        for expected in sorted(case.folder.glob("encoded_*/train.bin")):
            prefix = expected.parent.name.removeprefix("encoded_")
            count = len([name for name in report.recorded if name.startswith(f"{prefix}.line")])
            copy = Path(folder) / f"{prefix}.bin"
            write_token_file(copy, [report.recorded[f"{prefix}.line{line}"] for line in range(count)])
            compare_bytes(report, f"{prefix} file", copy, expected)
            report.close(f"{prefix}.meta", np.load(f"{copy}.meta").astype(np.int32))


def compare_bytes(report: Report, name: str, written: Path, expected: Path) -> None:
    """Compares a file of codes and its index."""
    pairs = [(written, expected), (Path(f"{written}.meta"), Path(f"{expected}.meta"))]
    report.same(name, [(two.name, filecmp.cmp(one, two, shallow=False), True) for one, two in pairs])
