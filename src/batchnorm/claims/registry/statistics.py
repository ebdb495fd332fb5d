"""Claims about statistics: Wu & Johnson 2021, Schneider 2020, Li 2019, and issues on padding."""

from __future__ import annotations

import math

from batchnorm.claims.claim import Bars, Claim, Lines, Source
from batchnorm.claims.experiments import serving, statistics
from batchnorm.claims.rules import Part

_AT_LEAST = math.inf
_WU = "Wu & Johnson 2021, arXiv:2105.07576"
_SCHNEIDER = "Schneider et al. 2020, arXiv:2006.16971"

CLAIMS = (
    Claim(
        name="samples-for-statistics",
        number=8,
        sentence="A thousand to ten thousand samples give precise statistics; running ones are erratic "
        "early in training and with large batches.",
        source=Source(
            f"{_WU}, section 3",
            "ImageNet: 10³ to 10⁴ samples suffice; validation error by running statistics far above that "
            "by precise ones in early epochs at large batches; in pictures",
        ),
        setting="2,500 digits of 14 × 14, two convolutions and a dense layer, SGD at rate 0.5 in batches "
        "of 500, 6 epochs of 5 steps; running statistics with momentum 0.1 against calibrated ones",
        parts=(
            Part(
                "1,024 samples",
                "held-out error by statistics of 1,024 training samples minus by all 2,500",
                "as good: within half a point",
                (-0.005, 0.005),
                None,
                0.002,
                "points",
            ),
            Part(
                "early",
                "held-out error in the first 3 epochs: running minus of 1,024 samples",
                "erratic: a point counts",
                (0.01, 1.0),
                0.0,
                0.03,
                "points",
            ),
            Part(
                "few samples",
                "held-out error by statistics of 8 samples minus by all",
                "worse: half a point counts",
                (0.005, 1.0),
                0.0,
                0.012,
                "points",
            ),
        ),
        experiment=statistics.samples_for_statistics,
        drawings=(
            Lines("epochs", "Held-out error, by epoch", "epoch", percent=True),
            Lines(
                "samples",
                "Held-out error after training, by samples",
                "training samples",
                log_x=True,
                percent=True,
            ),
        ),
        seconds=6,
    ),
    Claim(
        name="normalization-batch",
        number=9,
        sentence="Whatever the batch of SGD, the batch that normalizes decides: small ones cost accuracy, "
        "and freezing the statistics late in training wins some of it back.",
        source=Source(
            f"{_WU}, sections 3 and 4",
            "ImageNet, normalization batches of 2 to 1,024 at a fixed batch of SGD; in pictures",
            "read in the source; its figures are not quoted",
        ),
        setting="2,500 digits of 14 × 14, two convolutions and a dense layer, SGD in batches of 128, "
        "Ghost(2) to Ghost(128), 100 steps at rate 0.3, the last quarter at 0.03; frozen in that quarter, "
        "after calibration",
        parts=(
            Part(
                "batches of 2",
                "held-out error by population statistics: batches of 2 minus the best size",
                "worse, without a number here: half a point counts",
                (0.005, 1.0),
                0.0,
                0.06,
                "points",
            ),
            Part(
                "gain by freezing",
                "held-out error with batches of 2: to the end minus frozen late",
                "better, without a number here: half a point counts",
                (0.005, 1.0),
                0.0,
                0.06,
                "points",
            ),
        ),
        experiment=statistics.normalization_batch,
        drawings=(
            Lines(
                "errors",
                "Held-out error, by normalization batch and statistics",
                "samples that normalize",
                log_x=True,
                percent=True,
            ),
        ),
        seconds=13,
    ),
    Claim(
        name="ordered-batches",
        number=10,
        sentence="Batches that are ordered by class leak the label: training looks good, and serving does "
        "not; statistics of all samples together, or a shuffle, repair it.",
        source=Source(
            f"{_WU}, section 6, tables 3 and 6",
            "heads of R-CNN whose batches are in an order lose average precision; SyncBN and shuffling "
            "win it back",
            "read in the source; its figures are of detection and are not quoted",
        ),
        setting="2,500 digits, two ReLU layers of 100 units, SGD at rate 0.1 in batches of ten samples of "
        "each class, 200 steps; norm over groups of ten (Ghost(10)), which are of one class each if the "
        "batch is ordered",
        parts=(
            Part(
                "leak",
                "train–test gap, groups ordered minus shuffled",
                "a gap: five points count",
                (0.05, 1.0),
                0.0,
                0.02,
                "points",
            ),
            Part(
                "lost",
                "held-out accuracy: groups shuffled minus ordered",
                "lower: half a point counts",
                (0.005, 1.0),
                0.0,
                0.05,
                "points",
            ),
            Part(
                "left by the whole batch",
                "held-out accuracy: groups shuffled minus ordered ones with statistics of the whole batch",
                "repaired: within two points",
                (-0.02, 0.02),
                None,
                0.006,
                "points",
            ),
        ),
        experiment=statistics.ordered_batches,
        known="A group of one class is normalized by the statistics of that class, which takes away what "
        "tells it: in a network that is normalized throughout nothing is left to leak, and accuracy in "
        "training falls to chance as well. That it falls when served, and that statistics of the whole "
        "batch repair it, is as published.",
        drawings=(
            Bars(
                "Accuracy as in training (its own batches)",
                {
                    "shuffled, by groups": "train: shuffled, by groups",
                    "ordered, by groups": "train: ordered, by groups",
                    "ordered, groups at random": "train: ordered, groups drawn at random",
                    "ordered, whole batch": "train: ordered, whole batch",
                },
                "percent",
            ),
            Bars(
                "Held-out accuracy",
                {
                    "shuffled, by groups": "test: shuffled, by groups",
                    "ordered, by groups": "test: ordered, by groups",
                    "ordered, groups at random": "test: ordered, groups drawn at random",
                    "ordered, whole batch": "test: ordered, whole batch",
                },
                "percent",
            ),
        ),
        seconds=5,
    ),
    Claim(
        name="adaptation",
        number=11,
        sentence=(
            "Statistics of the test batch, alone or mixed with the running ones, cut the error on "
            "corrupted images."
        ),
        source=Source(
            f"{_SCHNEIDER}, abstract and table 1",
            "ResNet-50 on ImageNet-C, mean corruption error: 76.7 without, 65.0 with partial (−15.3 %), "
            "62.2 with full adaptation (−18.9 %); group normalization 72.4 (−5.6 %)",
        ),
        setting="2,500 digits of 14 × 14, two convolutions and a dense layer, 150 steps of SGD with "
        "momentum; 300 held-out images with noise, blur and less contrast of five strengths; partial: "
        "prior 16, batches of 8; full: prior 0, one batch",
        parts=(
            Part(
                "saved: full",
                "share of the error that full adaptation saves",
                "18.9 %",
                (0.189, 1.0),
                0.0,
                0.08,
                "percent",
            ),
            Part(
                "saved: partial",
                "share of the error that partial adaptation saves",
                "15.3 %",
                (0.153, 1.0),
                0.0,
                0.08,
                "percent",
            ),
            Part(
                "saved: group normalization",
                "share of the error that group normalization saves",
                "5.6 %",
                (0.056, 1.0),
                0.0,
                0.1,
                "percent",
            ),
        ),
        experiment=serving.adaptation,
        drawings=(
            Lines(
                "errors",
                "Error on images of strength 3, by test batch",
                "samples of a test batch",
                log_x=True,
                percent=True,
            ),
        ),
        seconds=14,
    ),
    Claim(
        name="dropout-before-norm",
        number=14,
        sentence="Dropout before a norm shifts the variance of its input between training and evaluation, "
        "and costs accuracy; behind all norms it does not.",
        source=Source(
            "Li et al. 2019, arXiv:1801.05134, sections 3 and 4",
            "for units kept with probability p the variance in training is 1/p + (1/p − 1) mean²/variance "
            "times that in evaluation: 2 or more for p = 0.5",
        ),
        setting="2,500 digits, three ReLU layers of 100 units, dropout 0.5 before each norm or behind all "
        "of them, SGD at rate 0.1 in batches of 64, 250 steps",
        parts=(
            Part(
                "shift",
                "variance of norm inputs, training over evaluation: dropout before the norms over behind all",
                "2 or more",
                (2.0, _AT_LEAST),
                1.0,
                0.02,
                "ratio",
            ),
            Part(
                "lost",
                "held-out accuracy: dropout behind all norms minus before them",
                "better, without a number here: half a point counts",
                (0.005, 1.0),
                0.0,
                0.01,
                "points",
            ),
        ),
        experiment=statistics.dropout_before_norm,
        drawings=(
            Lines("shifts", "Variance of a norm's input, training over evaluation, by layer", "norm"),
            Bars(
                "Held-out accuracy",
                {
                    "no dropout": "accuracy, none",
                    "before each norm": "accuracy, before",
                    "behind all norms": "accuracy, after all",
                },
                "percent",
            ),
        ),
        seconds=5,
    ),
    Claim(
        name="padding",
        number=18,
        sentence="Padding corrupts the statistics: predictions depend on how much of it there is; a mask "
        "prevents it, and accuracy gains.",
        source=Source(
            "github.com/pytorch/audio issue 4205, github.com/espnet/espnet pull request 6660",
            "outputs of convolutions with batch normalization change with the padding of the batch; no "
            "figure of accuracy",
        ),
        setting="speech (vowels, 270 utterances, 8 epochs) and text (languages, 1,000 fragments, 1 "
        "epoch), the study's networks conv1d and characters, Adam at 0.001 in batches of 32; 20 % more "
        "padding; statistics of the batch",
        parts=(
            Part(
                "vowels: moved",
                "mean total variation of predictions by padding, without the mask: speech",
                "they move, without a number: 0.01 counts",
                (0.01, 1.0),
                0.0,
                0.02,
                "number",
            ),
            Part(
                "languages: moved",
                "mean total variation of predictions by padding, without the mask: text",
                "they move, without a number: 0.01 counts",
                (0.01, 1.0),
                0.0,
                0.02,
                "number",
            ),
            Part(
                "vowels: moved by padding, masked",
                "mean total variation of predictions by padding, with the mask: speech",
                "they do not move",
                (-1e-4, 1e-4),
                None,
                0.0,
                "number",
            ),
            Part(
                "languages: moved by padding, masked",
                "mean total variation of predictions by padding, with the mask: text",
                "they do not move",
                (-1e-4, 1e-4),
                None,
                0.0,
                "number",
            ),
            Part(
                "vowels: gain",
                "held-out accuracy with the mask minus without: speech",
                "gains, without a number: half a point counts",
                (0.005, 1.0),
                0.0,
                0.02,
                "points",
            ),
            Part(
                "languages: gain",
                "held-out accuracy with the mask minus without: text",
                "gains, without a number: half a point counts",
                (0.005, 1.0),
                0.0,
                0.03,
                "points",
            ),
        ),
        experiment=serving.padding,
        known="Predictions move as claimed. Accuracy has no room here: speech is near its ceiling, and "
        "text after one epoch of 1,000 fragments near chance.",
        drawings=(
            Bars(
                "Movement of predictions by 20 % more padding",
                {
                    "speech, masked": "vowels: moved by padding, masked",
                    "speech, unmasked": "vowels: moved by padding, unmasked",
                    "text, masked": "languages: moved by padding, masked",
                    "text, unmasked": "languages: moved by padding, unmasked",
                },
            ),
            Bars(
                "Held-out accuracy",
                {
                    "speech, masked": "vowels: accuracy, masked",
                    "speech, unmasked": "vowels: accuracy, unmasked",
                    "text, masked": "languages: accuracy, masked",
                    "text, unmasked": "languages: accuracy, unmasked",
                },
                "percent",
            ),
        ),
        seconds=16,
    ),
)
