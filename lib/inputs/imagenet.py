"""Reads ImageNet (ILSVRC 2012) as folders: train/SYNSET/*.JPEG and val/SYNSET/*.JPEG.

Classes are in the order of their synsets, n01440764 first, as in every list of labels. Beside the
splits may lie LOC_synset_mapping.txt, as the copy on Kaggle has it, a line `SYNSET words` a class:
then classes are named by their words.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .folders import class_folders
from .rows import SPLIT_OF_NAME, Read

SYNSET = re.compile(r"n\d{8}")
WORDS = "LOC_synset_mapping.txt"


def is_imagenet(folder: Path) -> bool:
    """Says whether a folder has a split `train` with a synset in it."""
    train = folder / "train"
    return train.is_dir() and any(SYNSET.fullmatch(sub.name) for sub in train.iterdir())


def read(folder: Path) -> Read:
    """Reads the folder: by split labels and decoder, then the names of the classes.

    Raises ValueError as `class_folders`, for a split whose pictures lie in no class folder, and for
    a list of words that lacks a class or has a line of another form.
    """
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and sub.name.lower() in SPLIT_OF_NAME:
            _refuse_flat(sub)
    splits, synsets = class_folders(folder)
    return splits, _named(folder / WORDS, synsets) if (folder / WORDS).is_file() else synsets


def _refuse_flat(split: Path) -> None:
    """Raises ValueError for pictures as the archives of val and test unpack: without labels."""
    first = next((file for file in sorted(split.iterdir()) if file.suffix == ".JPEG"), None)
    if first is None:
        return
    if SPLIT_OF_NAME[split.name.lower()] == "test" and "_test_" in first.name:
        raise ValueError(
            f"{first} has no label: those of ImageNet's test pictures are not published. Move "
            f"{split} out of the data set, and name the folder of val test"
        )
    raise ValueError(
        f"{first} lies in no class folder: sort the pictures of {split.name} by class, as in "
        f"{split.name}/n01440764/{first.name}, by LOC_val_solution.csv of the copy on Kaggle, "
        "which names the synset of each. The devkit's ground truth numbers classes in another "
        "order (ILSVRC2012_ID in its meta.mat), not by their synsets"
    )


def _named(file: Path, synsets: list[str]) -> list[str]:
    """Names the classes by their words; where two have the same, by words and synset."""
    words_of_synset: dict[str, str] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        synset, _, words = line.strip().partition(" ")
        if not SYNSET.fullmatch(synset) or not words or synset in words_of_synset:
            raise ValueError(
                f"{file}, line {number}: {line!r} is no synset that is new here and its words, as "
                "in n01440764 tench, Tinca tinca. Get the file again, or take it away"
            )
        words_of_synset[synset] = words.strip()
    if absent := [synset for synset in synsets if synset not in words_of_synset]:
        raise ValueError(
            f"{file} has no words for class {absent[0]} ({len(absent)} such in all): get it again, "
            "or take it away"
        )
    words = [words_of_synset[synset] for synset in synsets]
    times = Counter(words)
    return [
        name if times[name] == 1 else f"{name} ({synset})"
        for name, synset in zip(words, synsets, strict=True)
    ]
