"""Print what plain models of scikit-learn find on the data of a study: the numbers in `studies/data.py`.

scikit-learn (a development dependency) is fitted on the same training examples, and
scored on the same held-out ones, as the networks of a study. Run from anywhere: python scripts/baselines.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from batchnorm.studies.data import SOURCES, load_data
from batchnorm.studies.padding import Examples, Padded


def _pixels(x: Examples) -> np.ndarray:
    assert isinstance(x, np.ndarray)
    return x.reshape(len(x), -1)


def _summaries(x: Examples) -> np.ndarray:
    assert isinstance(x, Padded)
    frames = [one[:length] for one, length in zip(x.values, x.lengths, strict=True)]
    return np.stack([np.concatenate([f.mean(0), f.std(0), f[0], f[-1]]) for f in frames])


def _texts(x: Examples) -> list[str]:
    assert isinstance(x, Padded)
    pairs = zip(x.values.astype(np.uint8), x.lengths, strict=True)
    return [row[:length].tobytes().decode() for row, length in pairs]


def _n_grams(longest: int) -> CountVectorizer:
    return CountVectorizer(analyzer="char", ngram_range=(1, longest), lowercase=False)


def _linear() -> Pipeline:
    return make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=2000))


# Of each data set: the models in the order of its `baselines`, each with what it is given.
MODELS: dict[str, tuple[Callable[[Examples], Any], tuple[Any, ...]]] = {
    "digits": (_pixels, (LogisticRegression(max_iter=2000), SVC())),
    "icons": (_pixels, (SVC(C=10),)),
    "vowels": (_summaries, (_linear(),)),
    "languages": (
        _texts,
        (
            make_pipeline(_n_grams(1), LogisticRegression(max_iter=2000)),
            make_pipeline(_n_grams(3), MultinomialNB(alpha=0.1)),
        ),
    ),
}


def accuracies(name: str) -> Iterator[float]:
    """Yields the held-out accuracy of each model on a data set."""
    data, (features, models) = load_data(name), MODELS[name]
    for model in models:
        model.fit(features(data.train), data.y_train)
        yield float(model.score(features(data.held_out), data.y_test))


def main() -> None:
    for name in MODELS:
        for (what, stored), found in zip(SOURCES[name].baselines, accuracies(name), strict=True):
            print(f"{name}: {found:.4f}, in studies/data.py {stored:.4f}: {what}")


if __name__ == "__main__":
    main()
