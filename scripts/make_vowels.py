"""Write the utterances that `batchnorm study --data vowels` ships with: src/batchnorm/studies/vowels.npz.

Japanese Vowels (Kudo, Toyama and Shimbo 1999, Pattern Recognition Letters 20, 1103-1111; UCI Machine
Learning Repository, CC BY 4.0): nine men say the vowels a and e; a frame holds 12 coefficients of linear
prediction; the speaker is the class. They are read from the archive of the PyPI package aeon 1.6.0, in its
order. Run from anywhere:

    pip download --no-deps aeon==1.6.0 && python scripts/make_vowels.py aeon-1.6.0-py3-none-any.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "src" / "batchnorm" / "studies" / "vowels.npz"
COEFFICIENTS, SPEAKERS = 12, 9
UTTERANCES = {"TRAIN": 270, "TEST": 370}
SCALE = 1_000_000  # numbers have six decimals, and are kept as integers, which are a third smaller compressed


def _utterances(lines: list[str]) -> tuple[list[np.ndarray], list[int]]:
    """Return the frames of each utterance, `[L, 12]`, and its speaker from 0."""
    frames, speakers = [], []
    for line in lines[lines.index("@data") + 1 :]:
        *series, label = line.split(":")
        values = np.array([[float(number) for number in one.split(",")] for one in series])
        frames.append(np.rint(values.T * SCALE).astype(np.int32))
        speakers.append(int(label) - 1)
    return frames, speakers


def main(archive: Path) -> None:
    stored: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(archive) as opened:
        for part, expected in UTTERANCES.items():
            name = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
            frames, speakers = _utterances(opened.read(name).decode().splitlines())
            lengths = [len(one) for one in frames]
            found = (
                len(frames),
                {one.shape[1] for one in frames},
                min(lengths),
                max(lengths),
                len(set(speakers)),
            )
            if found[:2] != (expected, {COEFFICIENTS}) or found[4] != SPEAKERS:
                raise SystemExit(f"{name} has changed: it holds {found}")
            prefix = part.lower()
            stored[f"{prefix}_frames"] = np.concatenate(frames)
            stored[f"{prefix}_lengths"] = np.array(lengths, np.uint8)
            stored[f"{prefix}_speakers"] = np.array(speakers, np.uint8)
    np.savez_compressed(TARGET, scale=np.int32(SCALE), **stored)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
