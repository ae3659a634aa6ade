"""Rules stated in the README of a case: the images of each prompt, the sampled elements, the compared elements."""

import re

from tests.golden_readers.case import Case

NUMBER = r"\d*\.?\d+(?:[eE][-+]?\d+)?"
_IMAGES = re.compile(r"\bimages?\s+(\d+(?:\s*(?:,\s*and|,|and)\s*\d+)*)", re.IGNORECASE)


def images_named(text: str) -> list[int]:
    """Returns the numbers in 'image 0', 'images 1 and 2' in order."""
    return [int(number) for found in _IMAGES.findall(text) for number in re.findall(r"\d+", found)]


def images_of_rows(text: str) -> dict[int, list[int]]:
    """Parses row -> images from 'row 0 -> image 0, row 1 image 1, row 2 text only'."""
    rows: dict[int, list[int]] = {}
    for row, statement in re.findall(r"\brow (\d+)\b(.*?)(?=\brow \d+\b|[;|\n]|$)", text, re.IGNORECASE | re.DOTALL):
        rows.setdefault(int(row), images_named(statement.split(".")[0]))
    return rows


def first_image_is_one(case: Case, num_images: int) -> bool:
    """Returns whether the README counts images from 1, that is, a number is too large for counting from 0."""
    named = images_named(case.readme)
    return bool(named) and max(named) >= num_images and min(named) >= 1


def assign_images(case: Case, array: str, images_per_row: list[int], num_images: int) -> tuple[list[int], str]:
    """Returns the images in the rows of a prompt array, in reading order, and the source of that assignment.

    The README's description of the array has priority, then its description of rows; without either, images are
    assigned in order. A description counts only if it gives every row as many images as the row has placeholders for.
    """
    total = sum(images_per_row)
    if not total:
        return [], ""
    if num_images == 1:
        return [0] * total, "the only image"
    offset = int(first_image_is_one(case, num_images))
    meaning = case.meaning(array)
    candidates = [(by_rows(images_of_rows(meaning), images_per_row), "README")]
    if len(images_per_row) == 1:
        candidates.append((images_named(meaning), "README"))
    else:
        candidates.append((by_rows(images_of_rows(case.readme), images_per_row), "README, rows"))
    for numbers, origin in candidates:
        chosen = [number - offset for number in numbers]
        if len(chosen) == total and all(0 <= number < num_images for number in chosen):
            return chosen, origin
    return [k % num_images for k in range(total)], "in order, the README does not say"


def by_rows(rows: dict[int, list[int]], images_per_row: list[int]) -> list[int]:
    """Returns the images of all rows in order, or nothing if a row needs another number of images."""
    if all(len(rows.get(row, [])) >= count for row, count in enumerate(images_per_row)):
        return [number for row, count in enumerate(images_per_row) for number in rows.get(row, [])[:count]]
    return []


def sampled_slice(text: str) -> slice | None:
    """Parses the slice in 'rows/columns 5, 21, 37, ...'."""
    found = re.search(r"rows?\s*(?:/|and)\s*columns?\s+(\d+),\s*(\d+)", text)
    if not found:
        return None
    first, second = map(int, found.groups())
    return slice(first, None, second - first)


def cropped_slices(text: str) -> tuple[slice, slice] | None:
    """Parses the slices in 'rows 480..527, columns 500..563' (both ends included)."""
    found = re.search(r"rows\s+(\d+)\s*\.\.\s*(\d+),?\s*(?:and\s+)?columns\s+(\d+)\s*\.\.\s*(\d+)", text)
    if not found:
        return None
    top, bottom, left, right = map(int, found.groups())
    return slice(top, bottom + 1), slice(left, right + 1)


def gradient_floor(case: Case) -> float:
    """Parses x in 'where |grad| > x'; 0 if absent.

    After a step with a tiny eps, only these parameters are compared.
    """
    found = re.search(rf"\|?grad(?:ient)?\|?\s*(?:>=?|above)\s*({NUMBER})", case.readme)
    return float(found.group(1)) if found else 0.0
