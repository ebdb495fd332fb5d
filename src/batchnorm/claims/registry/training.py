"""Claims about speed and the loss: Ioffe & Szegedy 2015, Santurkar et al. 2018, Bjorck et al. 2018."""

from __future__ import annotations

import math

from batchnorm.claims.claim import Bars, Claim, Grid, Lines, Source
from batchnorm.claims.experiments import landscape, speed
from batchnorm.claims.rules import Part

_AT_LEAST = math.inf
_IOFFE = "Ioffe & Szegedy 2015, arXiv:1502.03167"
_SANTURKAR = "Santurkar et al. 2018, arXiv:1805.11604"
_BJORCK = "Bjorck et al. 2018, arXiv:1806.02375"

CLAIMS = (
    Claim(
        name="sigmoid-layers",
        number=1,
        sentence="A network of sigmoid layers trains faster, and the input of its last sigmoid is stable.",
        source=Source(
            f"{_IOFFE}, section 4.1 and figure 1",
            "MNIST, 3 layers of 100 sigmoid units, batches of 60, 50,000 steps: higher accuracy sooner, "
            "and percentiles of a unit's input that move little; in pictures, without numbers",
        ),
        setting=(
            "2,500 digits, the same network and batches, SGD at rate 0.3, 1,800 steps; no norm against "
            "batchnorm"
        ),
        parts=(
            Part(
                "speed-up",
                "steps to 85 % held-out accuracy without the norm, over those with it",
                "faster, without a number: a tenth counts",
                (1.1, _AT_LEAST),
                1.0,
                0.2,
                "ratio",
            ),
            Part(
                "steadier",
                "movement of the 15th, 50th and 85th percentile of a unit's input to the last sigmoid, in "
                "widths from 15 to 85 %, after a sixteenth of the steps: without over with the norm",
                "more stable, without a number: a fifth counts",
                (1.2, _AT_LEAST),
                1.0,
                0.2,
                "ratio",
            ),
        ),
        experiment=speed.sigmoid_layers,
        drawings=(
            Lines("accuracy", "Held-out accuracy, by step", "step", percent=True),
            Lines("inputs", "A unit's input to the last sigmoid: percentiles, by step", "step"),
        ),
        seconds=12,
    ),
    Claim(
        name="larger-rates",
        number=2,
        sentence="Batch normalization reaches the same accuracy in fewer steps, the more so at larger "
        "rates, which the plain network does not bear; and it makes sigmoid networks trainable.",
        source=Source(
            f"{_IOFFE}, section 4.2, figures 2 and 3",
            "Inception on ImageNet, steps to 72.2 %: 31.0 M without; with it 13.3 M (÷ 2.33), 2.1 M at 5 "
            "times the rate (÷ 14.8), 2.7 M at 30 times (÷ 11.5); sigmoid with it 69.8 %, without it "
            "chance; without it, 5 times the rate diverges",
        ),
        setting="2,500 digits of 14 × 14, two convolutions and a dense layer, SGD in batches of 32, 200 "
        "steps; the rate 0.2, at which the plain network is fastest, times 1, 5 and 30; 500 held-out "
        "examples",
        parts=(
            Part(
                "speed-up × 1",
                "steps to 90 % without the norm over those with it, at the same rate",
                "÷ 2.33",
                (31.0 / 13.3, _AT_LEAST),
                1.0,
                0.25,
                "ratio",
            ),
            Part(
                "speed-up × 5",
                "steps to 90 % without the norm over those with it at 5 times the rate",
                "÷ 14.8",
                (31.0 / 2.1, _AT_LEAST),
                1.0,
                0.25,
                "ratio",
            ),
            Part(
                "speed-up × 30",
                "steps to 90 % without the norm over those with it at 30 times the rate",
                "÷ 11.5",
                (31.0 / 2.7, _AT_LEAST),
                1.0,
                0.25,
                "ratio",
            ),
            Part(
                "sigmoid",
                "accuracy with sigmoids, with minus without the norm, at 5 times the rate",
                "69.8 % against chance (0.1 %)",
                (0.5, 1.0),
                0.0,
                0.05,
                "points",
            ),
            Part(
                "without at × 5",
                "accuracy without the norm at 5 times the rate",
                "diverges: chance is 10 %",
                (-math.inf, 0.2),
                None,
                0.02,
                "percent",
            ),
        ),
        experiment=speed.larger_rates,
        known="The plain network's best rate here is near the largest that it bears, so that 5 and 30 "
        "times it are beyond what the normalized one can use; the rate of the paper's was far below.",
        drawings=(
            Lines("accuracy", "Held-out accuracy, by step", "step", percent=True),
            Bars(
                "Steps to 90 % held-out accuracy (200: not reached)",
                {
                    "none × 1": "steps: none, relu, × 1",
                    "batchnorm × 1": "steps: batchnorm, relu, × 1",
                    "batchnorm × 5": "steps: batchnorm, relu, × 5",
                    "batchnorm × 30": "steps: batchnorm, relu, × 30",
                    "batchnorm × 5, sigmoid": "steps: batchnorm, sigmoid, × 5",
                },
            ),
        ),
        seconds=16,
    ),
    Claim(
        name="noise-behind-norm",
        number=3,
        sentence="With noise behind the norm, whose inputs are less steady than without any norm, "
        "training still beats the plain network: steady inputs are not why batch normalization helps.",
        source=Source(
            f"{_SANTURKAR}, section 2.1 and figure 2",
            "VGG on CIFAR-10: the noisy network trains as well as the normalized one and better than the "
            "plain one, with the least steady inputs; in pictures, without numbers",
        ),
        setting="2,500 digits, 3 layers of 100 sigmoid units, SGD at rate 0.1 in batches of 60, 500 "
        "steps; noise with mean −0.5 to 0.5 and scale 0.8 to 1.25, drawn for each unit and step",
        parts=(
            Part(
                "gain with noise",
                "mean held-out accuracy over training: noisy minus none",
                "better, without a number: half a point counts",
                (0.005, _AT_LEAST),
                0.0,
                0.05,
                "points",
            ),
            Part(
                "more drift",
                "how far moments of layer inputs move in a step: noisy over none",
                "less steady, without a number: a fifth counts",
                (1.2, _AT_LEAST),
                1.0,
                0.15,
                "ratio",
            ),
            Part(
                "lost by noise",
                "mean held-out accuracy over training: without noise minus with it",
                "about as good: less than two points lost",
                (-math.inf, 0.02),
                None,
                0.003,
                "points",
            ),
        ),
        experiment=speed.noise_behind,
        drawings=(
            Lines("accuracy", "Held-out accuracy, by step", "step", percent=True),
            Lines(
                "drift", "Movement of layer inputs in a step, in deviations, log scale", "step", log_y=True
            ),
        ),
        seconds=6,
    ),
    Claim(
        name="smoother-loss",
        number=4,
        sentence="Along the gradient, the loss varies less, the gradient changes less, and the effective "
        "smoothness constant is smaller.",
        source=Source(
            f"{_SANTURKAR}, section 3.1 and figure 4",
            "VGG on CIFAR-10: bands over training several times narrower; in pictures, without numbers",
        ),
        setting="2,500 digits of 14 × 14, three convolutions and a dense layer, SGD at rate 0.1 in "
        "batches of 64, 160 steps; every 20 steps, eight step lengths of 0.05 to 0.4 along the gradient "
        "of 128 examples",
        parts=(
            Part(
                "loss",
                "range of losses along the gradient, geometric mean over training: none over batchnorm",
                "several times: twice counts",
                (2.0, _AT_LEAST),
                1.0,
                0.4,
                "ratio",
            ),
            Part(
                "gradient",
                "largest distance of the gradient from that at the start, in the same way",
                "several times: twice counts",
                (2.0, _AT_LEAST),
                1.0,
                0.3,
                "ratio",
            ),
            Part(
                "smoothness",
                "largest change of the gradient per distance, in the same way",
                "several times: twice counts",
                (2.0, _AT_LEAST),
                1.0,
                0.2,
                "ratio",
            ),
        ),
        experiment=landscape.along_the_gradient,
        drawings=(
            Lines("spread", "Range of losses along the gradient, by step, log scale", "step", log_y=True),
            Lines("smoothness", "Effective smoothness β, by step, log scale", "step", log_y=True),
        ),
        seconds=9,
    ),
    Claim(
        name="only-larger-rates",
        number=5,
        sentence="At an equal small rate nothing is gained; what batch normalization allows is larger "
        "rates, at which activations explode with depth without it.",
        source=Source(
            f"{_BJORCK}, sections 2 and 3, figures 1 to 4",
            "ResNet-110 on CIFAR-10: at rate 0.0001 the same accuracy with and without; with it 0.1 "
            "works; on the way to divergence, activations of upper layers grow by orders of magnitude; in "
            "pictures",
        ),
        setting="2,500 digits, ten ReLU layers of 64 units, SGD in batches of 64, 300 steps, rates 0.01, "
        "0.1, 0.3 and 1; activations at rate 1.0 up to divergence, and with the norm for as many steps",
        parts=(
            Part(
                "at rate 0.01",
                "held-out accuracy at rate 0.01: batchnorm minus none",
                "nothing is gained: less than half a point",
                (-math.inf, 0.005),
                None,
                0.02,
                "points",
            ),
            Part(
                "larger rates",
                "largest rate with 85 % held-out accuracy: batchnorm over none",
                "a thousand times between the two; ten times counts",
                (10.0, _AT_LEAST),
                1.0,
                0.6,
                "ratio",
            ),
            Part(
                "explosion",
                "activations of the last hidden layer over the first at the last finite step: none over "
                "batchnorm",
                "orders of magnitude: ten times counts",
                (10.0, _AT_LEAST),
                1.0,
                1.5,
                "ratio",
            ),
        ),
        experiment=landscape.rate_sweep,
        known="With the norm, larger rates work, and without it activations explode, as published. At rate "
        "0.01 both networks are still on their way after 300 steps, so seeds differ by several points, and "
        "five of them cannot tell half a point.",
        drawings=(
            Lines(
                "rates",
                "Held-out accuracy, by learning rate (diverged runs at 0)",
                "learning rate",
                log_x=True,
                percent=True,
            ),
            Grid(
                "activations",
                "Activations before divergence, log₁₀, without the norm",
                "steps before divergence",
                "layer",
                unit="log10",
                columns=tuple(f"{step}" for step in range(-11, 1)),
            ),
        ),
        seconds=16,
    ),
)
