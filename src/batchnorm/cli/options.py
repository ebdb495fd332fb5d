"""Declares the arguments and options of the commands, for Typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None, typer.Option(help="Folder with MNIST's IDX files or mnist.npz, or a cache of them.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]

# Of the study.
Networks = Annotated[
    str,
    typer.Option(help="Comma-separated: those of --list, or your own as file.py:function; auto: the data's."),
]
StudyData = Annotated[
    str,
    typer.Option(help="Comma-separated: those that --list names, or your own as file.py:function."),
]
Depths = Annotated[
    str,
    typer.Option(help="Comma-separated: hidden layers or blocks of deep, residual-mlp or your own network."),
]
Optimizer = Annotated[str, typer.Option(help="sgd, adam or adamw.")]
Momentum = Annotated[float | None, typer.Option(help="Of sgd.", show_default="0.9")]
WeightDecay = Annotated[
    float, typer.Option(help="Of weights of dense and convolution layers; adamw decouples it.")
]
ListChoices = Annotated[bool, typer.Option("--list", help="List the data, networks and arms, and stop.")]
Framework = Annotated[
    str, typer.Option(help="torch, or keras on the backend that KERAS_BACKEND or Keras's settings name.")
]
Arms = Annotated[
    str,
    typer.Option(help="Comma-separated, joined by + if wanted; --list names them; auto: by the data."),
]
LearningRates = Annotated[str, typer.Option(help="Comma-separated; auto: by the optimizer.")]
Seeds = Annotated[int, typer.Option(help="Runs with different initial weights and orders.")]
Epochs = Annotated[str, typer.Option(help="Passes over the training data; auto: by the data.")]
StepSizes = Annotated[
    str, typer.Option(help="Comma-separated: examples per training step; auto: by the data.")
]
Loss = Annotated[
    str,
    typer.Option(help="cross_entropy, mse, or your own as file.py:function of outputs and targets."),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="accuracy, r2, or your own as file.py:function of outputs and targets in NumPy; more is better.",
        show_default="accuracy with cross_entropy, else r2",
    ),
]
TargetAccuracy = Annotated[
    float,
    typer.Option(help="Held-out accuracy, or other metric, up to 1, that 'steps to target' counts up to."),
]
Jobs = Annotated[
    str, typer.Option(help="Training runs at a time; auto is one per core, or per thread of the executor.")
]
Executor = Annotated[
    str | None,
    typer.Option(
        help="Runs on a Dask cluster: dask:tcp://host:8786, the scheduler's address.",
        show_default="processes of this machine",
    ),
]
StudyOut = Annotated[
    Path | None,
    typer.Option(
        help="Folder of results; a second call goes on there.",
        show_default="runs/study-DATA, study-keras-BACKEND-... with keras",
    ),
]

# Of the claims.
ClaimNames = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Claims, or their numbers; all, unless given.")
]
ClaimSeeds = Annotated[
    int, typer.Option("--seeds", help="Runs of each experiment; a verdict takes 5 or more.")
]
ClaimsOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of results; a second call goes on there.", show_default="runs/claims"),
]
ListClaims = Annotated[bool, typer.Option("--list", help="List the claims, and stop.")]

# Of the verbs on a model.
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="file.py:function or package.module:function; it returns a module."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Loaded into it: safetensors, or a torch checkpoint without code in it.")
]
Data = Annotated[
    str | None, typer.Option(help="digits, icons, mnist, or your own as file.py:function, as for `study`.")
]
CalibrationData = Annotated[str, typer.Option(help="digits, icons, mnist, or your own as file.py:function.")]
Samples = Annotated[int | None, typer.Option(help="How many of the training examples; all, unless given.")]
BatchSize = Annotated[int, typer.Option(help="Examples per batch.")]
Input = Annotated[
    str | None, typer.Option(help="Shape of an input, such as 1x3x224x224; examples of the data take it too.")
]
Method = Annotated[
    str, typer.Option(help="batch: one pass, as in training; layerwise: of the network as deployed, in more.")
]
Resume = Annotated[
    Path | None, typer.Option(help="Where to note how far it has come; the same command goes on from there.")
]
Picture = Annotated[Path | None, typer.Option(help="SVG to draw: how far off each layer's statistics were.")]
DoctorSamples = Annotated[int, typer.Option(help="How many of the training examples, at most.")]
Page = Annotated[Path | None, typer.Option(help="Page to write: .html.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a finding is serious.")]
Ignore = Annotated[
    str, typer.Option(help="Comma-separated checks to leave out: bias-before, or bias-before:features.3.")
]
Out = Annotated[Path, typer.Option(help="File to write: .safetensors.")]
FoldOut = Annotated[
    Path, typer.Option(help="File to write: .onnx or .pt2 to run it, .safetensors its weights.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
