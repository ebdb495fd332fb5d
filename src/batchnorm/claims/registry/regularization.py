"""Claims about regularization: Hoffer 2017, Luo 2019, van Laarhoven 2017, and the norm's place."""

from __future__ import annotations

import math

from batchnorm.claims.claim import Bars, Claim, Grid, Lines, Source
from batchnorm.claims.experiments import regularization
from batchnorm.claims.rules import Part

_AT_LEAST = math.inf

CLAIMS = (
    Claim(
        name="large-batches",
        number=12,
        sentence="Large batches generalize worse at equal epochs; ghost batches narrow the gap, and as "
        "many steps as small batches take close it.",
        source=Source(
            "Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, abstract",
            "“stems from the relatively small number of updates … can be completely eliminated”; ghost "
            "batch normalization: “significant decrease in the generalization gap without increasing the "
            "number of updates”. MNIST by memory: 98.27 % small, 97.05 large, 97.60 ghost, 98.53 longer",
            "read in the abstract; the figures of MNIST are from memory and could not be verified",
        ),
        setting="2,500 digits, two ReLU layers of 100 units, SGD: batches of 32 at rate 0.1 against 1,250 "
        "at 0.1 and at 0.1 √(1250/32), 4 epochs; Ghost(32); with as many steps as the small batches take. "
        "All calibrated",
        parts=(
            Part(
                "gap",
                "held-out accuracy: small minus large batches, equal epochs and rate",
                "worse: half a point counts",
                (0.005, 1.0),
                0.0,
                0.015,
                "points",
            ),
            Part(
                "closed by ghost batches",
                "held-out accuracy at the scaled rate: with minus without ghost batches",
                "significant, without a number in the abstract: half a point counts",
                (0.005, 1.0),
                0.0,
                0.004,
                "points",
            ),
            Part(
                "left by equal steps",
                "held-out accuracy: small minus large batches with ghost batches and equal steps",
                "eliminated: at most half a point",
                (-1.0, 0.005),
                None,
                0.006,
                "points",
            ),
        ),
        experiment=regularization.large_batches,
        known="After eight steps at equal epochs, steps are what is missing: the scaled rate brings most "
        "of them back, as many steps as small batches take leave a third of a point or so, and the noise "
        "of ghost batches costs some tenths. The gain of 0.05 points remembered for MNIST is excluded as "
        "well.",
        drawings=(
            Bars(
                "Held-out accuracy",
                {
                    "batches of 32": "small",
                    "1,250": "large",
                    "1,250, scaled rate": "large, rate",
                    "1,250, rate, ghost": "large, rate, ghost",
                    "rate, ghost, equal steps": "large, rate, ghost, steps",
                },
                "percent",
            ),
        ),
        seconds=10,
    ),
    Claim(
        name="gamma-decay",
        number=13,
        sentence="As a regularizer, batch normalization is normalization by population statistics and a "
        "decay of γ that falls with the batch.",
        source=Source(
            "Luo et al. 2019, arXiv:1809.00846, abstract",
            "“can be decomposed into population normalization (PN) and gamma decay”",
            "read in the abstract; no figure of the experiments is quoted",
        ),
        setting="2,500 digits of 14 × 14, one ReLU layer of 128 units, SGD at rate 0.3 in batches of 128, "
        "200 steps; Ghost(8), (32), (128) against statistics of 512 samples with γ's decay 0.006 · 8 / "
        "batch (found at 8 in trials)",
        parts=(
            Part(
                "regularizes",
                "held-out minus training loss: population statistics minus batches of 8",
                "regularizes, without a number here: 0.005 counts",
                (0.005, _AT_LEAST),
                0.0,
                0.01,
            ),
            Part(
                "falls with the batch",
                "held-out minus training loss: batches of 128 minus batches of 8",
                "falls with the batch: 0.005 counts",
                (0.005, _AT_LEAST),
                0.0,
                0.01,
            ),
            Part(
                "replaced",
                "distance of held-out minus training loss from that of batch statistics, mean over batches "
                "of 8, 32 and 128: population statistics over the same with decay of γ",
                "replaces it: twice counts",
                (2.0, _AT_LEAST),
                1.0,
                0.5,
                "ratio",
            ),
        ),
        experiment=regularization.gamma_decay,
        drawings=(
            Lines(
                "gaps",
                "Held-out minus training loss, by normalization batch",
                "samples that normalize",
                log_x=True,
            ),
        ),
        seconds=14,
    ),
    Claim(
        name="effective-rate",
        number=15,
        sentence=(
            "With batch normalization, L2 does not regularize: all it does is set the effective learning "
            "rate η / ‖w‖²."
        ),
        source=Source(
            "van Laarhoven 2017, arXiv:1706.05350, sections 2 and 3",
            "the output does not depend on ‖w‖, and the effective rate is η / ‖w‖²; in equilibrium it "
            "goes with √(η λ)",
        ),
        setting="2,500 digits of 14 × 14, ReLU layers of 100 units: one layer, SGD in batches of 64, 500 "
        "steps, η 0.3 and 1, λ 0.01 to 0.1; and two layers in float64, 100 steps at η = 0.1, λ = 0.03, L2 "
        "replaced by rates that keep η / ‖w‖²",
        parts=(
            Part(
                "explained",
                "movement of held-out predictions (total variation) when L2 is removed, over that when it "
                "is replaced by its effective rate",
                "all: a hundred times counts",
                (100.0, _AT_LEAST),
                1.0,
                1.5,
                "ratio",
            ),
            Part(
                "exponent",
                "exponent of η λ in the effective rate at the end of training",
                "1/2; within 0.15",
                (0.35, 0.65),
                0.0,
                0.05,
            ),
        ),
        experiment=regularization.effective_rate,
        drawings=(
            Lines("norms", "Squared norm of the first layer's weights, by step", "step"),
            Grid(
                "rates",
                "Effective rate η / ‖w‖² at the end, log₁₀",
                "weight decay λ",
                "learning rate η",
                columns=("0.01", "0.03", "0.1"),
                rows=("0.3", "1"),
                unit="log10",
            ),
        ),
        seconds=13,
    ),
    Claim(
        name="placement",
        number=17,
        sentence=(
            "Behind ReLU the norm does better than before it, and a little dropout beside it better than "
            "much or none."
        ),
        source=Source(
            "ducha-aiki/caffenet-benchmark, batch normalization",
            "CaffeNet at 128 × 128 on ImageNet: 0.478 before and 0.493 behind ReLU; dropout 0.5, 0.2 and "
            "0: 0.499, 0.527, 0.513",
        ),
        setting="1,270 icons of 16 × 16, two convolutions and a dense layer of 64 units with dropout, SGD "
        "with momentum 0.9 at rate 0.05 in batches of 64, 120 steps",
        parts=(
            Part(
                "after less before",
                "held-out accuracy, mean over dropout 0, 0.2 and 0.5: behind minus before ReLU",
                "+1.5 points",
                (0.015, 1.0),
                0.0,
                0.015,
                "points",
            ),
            Part(
                "dropout 0.2 less 0.5",
                "held-out accuracy, mean over both places: dropout 0.2 minus 0.5",
                "+2.8 points",
                (0.028, 1.0),
                0.0,
                0.015,
                "points",
            ),
            Part(
                "dropout 0.2 less none",
                "held-out accuracy, mean over both places: dropout 0.2 minus none",
                "+1.4 points",
                (0.014, 1.0),
                0.0,
                0.015,
                "points",
            ),
        ),
        experiment=regularization.placement,
        known="After few steps held-out accuracy is near 60 %, and differs by several points from seed to "
        "seed, as much as the published effects.",
        drawings=(
            Grid(
                "accuracy",
                "Held-out accuracy, by place and dropout",
                "dropout",
                "place",
                columns=("0", "0.2", "0.5"),
                rows=("before ReLU", "behind ReLU"),
                unit="percent",
            ),
        ),
        seconds=10,
    ),
)
