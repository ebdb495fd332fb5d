"""Claims about depth: Yang et al. 2019, De & Smith 2020, Frankle et al. 2021."""

from __future__ import annotations

import math

from batchnorm.claims.claim import Bars, Claim, Lines, Source
from batchnorm.claims.experiments import depth, serving
from batchnorm.claims.rules import Part

_AT_LEAST = math.inf
_LAYERS = tuple(range(2, 51))
_BLOCKS = (4, 8, 16, 32, 64, 128)

CLAIMS = (
    Claim(
        name="exploding-gradients",
        number=6,
        sentence="At initialization, batch normalization makes gradients explode with depth, by about "
        "1.21 a ReLU layer, and networks of more than 50 layers do not train.",
        source=Source(
            "Yang et al. 2019, arXiv:1902.08129, abstract and section 3",
            "√(π / (π − 1)) ≈ 1.21 a layer for ReLU, in the limit of width and batch; not trainable "
            "beyond 50 layers",
        ),
        setting="digits, ReLU layers: gradient norms of 50 layers of 512 units, a batch of 256; training "
        "accuracy of 10 and 60 layers of 128 units after 100 steps of SGD in batches of 64 at the better "
        "of the rates 0.01 and 0.1",
        parts=(
            Part(
                "growth, batchnorm",
                "growth of a weight's gradient norm per layer, from the last to the first",
                "× 1.21; within 3 %",
                (1.21 / 1.03, 1.21 * 1.03),
                1.0,
                0.004,
                "ratio",
            ),
            Part(
                "accuracy at depth 60",
                "training accuracy of 60 layers",
                "not trainable: below 30 % counts",
                (-math.inf, 0.3),
                None,
                0.05,
                "percent",
            ),
            Part(
                "lost",
                "training accuracy of 10 layers minus that of 60",
                "shallow ones train: half of all counts",
                (0.5, 1.0),
                0.0,
                0.05,
                "points",
            ),
        ),
        experiment=depth.exploding_gradients,
        drawings=(
            Lines(
                "gradients",
                "Gradient norm over that of the last layer, by layer, log scale",
                "layer",
                log_y=True,
                references={"1.21 a layer": (_LAYERS, tuple(1.2110 ** (50 - layer) for layer in _LAYERS))},
            ),
        ),
        seconds=12,
    ),
    Claim(
        name="residual-branches",
        number=7,
        sentence="Batch normalization scales a residual branch down against its skip connection by about "
        "the square root of the depth, which makes deep networks trainable; SkipInit does as well.",
        source=Source(
            "De & Smith 2020, arXiv:2002.10444, abstract",
            "“a normalizing factor on the order of the square root of the network depth”; deep networks "
            "train without normalization from SkipInit, as well at moderate batch sizes",
            "read in the abstract; no figure of the experiments is quoted",
        ),
        setting="digits, blocks x + dense(relu(norm(x))) of 64 units with He's initialization: ratio of "
        "standard deviations in the last of 4 to 128 blocks; held-out accuracy of 32 blocks after 120 "
        "steps of SGD in batches of 64 at the better of the rates 0.01 and 0.1",
        parts=(
            Part(
                "exponent, batchnorm",
                "exponent of depth in the ratio of the last branch's deviation to the skip's",
                "−1/2; within 0.1",
                (-0.6, -0.4),
                0.0,
                0.02,
            ),
            Part(
                "gain",
                "held-out accuracy of 32 blocks: batchnorm minus none",
                "trainable against not: half of all counts",
                (0.5, 1.0),
                0.0,
                0.05,
                "points",
            ),
            Part(
                "less than skipinit",
                "held-out accuracy of 32 blocks: skipinit minus batchnorm",
                "as well: within two points",
                (-0.02, 0.02),
                None,
                0.02,
                "points",
            ),
        ),
        experiment=depth.residual_branches,
        known="The first two parts hold. SkipInit trails after 120 steps: its branches start from 0, and "
        "their scales have to be learned first. Five seeds do not tell whether it trails by more than two "
        "points.",
        drawings=(
            Lines(
                "branches",
                "Branch over skip, standard deviations, by depth, log scale",
                "residual blocks",
                log_x=True,
                log_y=True,
                references={"depth^(−1/2)": (_BLOCKS, tuple(blocks**-0.5 for blocks in _BLOCKS))},
            ),
            Bars(
                "Held-out accuracy of 32 blocks",
                {"none": "none", "batchnorm": "batchnorm", "skipinit": "skipinit"},
                "percent",
            ),
        ),
        seconds=12,
    ),
    Claim(
        name="affine-alone",
        number=16,
        sentence="Training γ and β alone, with everything else random, reaches a high accuracy, higher "
        "than as many other weights, and turns a third of the features off.",
        source=Source(
            "Frankle, Schwab & Morcos 2021, arXiv:2003.00152, sections 4 and 5",
            "CIFAR-10: 82 % by γ and β of ResNet-866, more than by as many random weights; about a third "
            "of γ below 0.01 in size",
        ),
        setting="2,500 digits, 6 residual blocks of 64 units, γ from 0 to 1 at the start, SGD with "
        "momentum 0.9 at rate 0.1 in batches of 64, 300 steps; the output layer is frozen too",
        parts=(
            Part(
                "affine",
                "held-out accuracy by γ and β alone",
                "82 % (of another task)",
                (0.82, 1.0),
                0.1,
                0.03,
                "percent",
            ),
            Part(
                "more than random weights",
                "held-out accuracy: γ and β minus as many random weights",
                "more, without a number here: half a point counts",
                (0.005, 1.0),
                0.0,
                0.03,
                "points",
            ),
            Part(
                "off",
                "share of γ below 0.01 in size",
                "a third; from a fifth to a half counts",
                (0.2, 0.5),
                0.01,
                0.02,
                "percent",
            ),
        ),
        experiment=serving.affine_alone,
        known="Six narrow blocks for 300 steps: the published figures are of hundreds of blocks, of 160 "
        "epochs, and of weight decay, which drives γ to 0.",
        drawings=(
            Bars(
                "Held-out accuracy by what learns",
                {"γ and β": "affine", "as many random weights": "random", "everything": "all"},
                "percent",
            ),
            Lines("gamma", "Share of γ, by size", "size of γ", percent=True),
        ),
        seconds=10,
    ),
)
