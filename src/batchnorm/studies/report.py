"""The report of a study: one HTML file that needs nothing else, made from `results.json` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from batchnorm.studies.frameworks import framework_in_words
from batchnorm.studies.html_page import render_template, write_html
from batchnorm.studies.objectives import with_metric
from batchnorm.studies.plots import Picture, axes_of, illustrate
from batchnorm.studies.settings import shown_number
from batchnorm.studies.verdicts import RULE, Claim, Grade, Network, Study, in_short, judge, read
from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.results import Sample

# Of each claim, in this order: the heading of its pictures where it could not be judged.
_HEADINGS = {
    "speed": "How training went",
    "rates": "Accuracy by learning rate",
    "accuracy": "Held-out accuracy",
    "padding": "Padding",
    "gradients": "Gradients",
    "drift": "Inputs of layers",
    "statistics": "Statistics at test time",
    "cost": "Cost of a step",
}

# What the pictures of a claim show.
_SENTENCES = {
    "speed": "Lines are means over seeds, with a band of one standard deviation. Each arm trains at its best "
    "learning rate.",
    "rates": "Each point is the accuracy at the end of training with one learning rate. A diverged run "
    "counts as 0.",
    "accuracy": "Each dot is a mean difference between two arms on the same seeds, with its 95 % interval. A "
    "difference within the grey band is too small to matter.",
    "padding": "Each arm trains at its best learning rate.",
    "gradients": "Each line is a layer, from the first (strongest) to the last (palest). Where lines are far "
    "apart, some layers learn much faster than others.",
    "drift": "The band contains most inputs of a hidden layer during training. Where it moves, the layer has "
    "to adapt.",
    "statistics": "The same trained networks are evaluated with the statistics of each batch, with running "
    "statistics, and with those of all training data (calibrated). Each dot is a seed.",
    "cost": "Each bar is the median time of a step over blocks of training steps, or the memory that a step "
    "keeps for its backward.",
}

_BADGES = {
    Grade.SUPPORTED: ("yes", "✓"),
    Grade.PARTLY: ("partly", "◐"),
    Grade.UNCLEAR: ("unclear", "≈"),
    Grade.AGAINST: ("no", "✗"),
    Grade.INDICATION: ("hint", "?"),
    Grade.MEASURED: ("number", "#"),
}

# What an entry of the provenance is called, in this order; entries not named here follow under their own.
_METHOD = {
    "framework": "Framework",
    "data": "Data",
    "networks": "Networks",
    "arms": "Arms",
    "learning_rates": "Learning rates",
    "seeds": "Seeds",
    "epochs": "Epochs",
    "batch_sizes": "Batch sizes (examples)",
    "loss": "Loss",
    "metric": "Metric",
    "target_accuracy": "Target for “steps to target” (held-out accuracy, fraction)",
    "optimizer": "Optimizer",
    "penalties": "Penalties added to the loss",
    "best_rate": "Best rate of an arm",
    "std": "±",
    "device": "Device",
    "machine": "Machine",
    "cpu_count": "Processor cores",
    "executor": "Executor",
    "threads": "Threads",
    "workers": "Training runs at a time",
    "versions": "Versions",
    "date": "Date",
}


_ELSEWHERE = ("command", "backend", "runs_planned", "runs_finished")  # shown in other places


@dataclass(frozen=True)
class Topic:
    """A claim with its pictures and what they show, or the pictures alone where nothing could be judged."""

    key: str
    heading: str
    sentence: str
    claim: Claim | None
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Section:
    """The section of one network."""

    name: str
    anchor: str
    summary: str
    claims: Mapping[str, Claim]
    topics: tuple[Topic, ...]
    table: tuple[tuple[str, ...], ...]


def write_report(folder: Path) -> Path:
    """Writes `report.html` from the `results.json` in a study's folder.

    Args:
        folder: where `results.json` is, and where the report goes, in full or not at all.

    Returns:
        The path of the report.

    Raises:
        DataError: `results.json` is missing or malformed.
        FileError: it cannot be read, or the report not written.
    """
    study = read(folder / "results.json")
    path = folder / "report.html"
    page = render(study)
    if isinstance(metric := study.provenance.get("metric"), str):
        page = with_metric(page, escape(metric))
    write_html(path, page)
    return path


def render(study: Study) -> str:
    """Returns the report as HTML; every name and value in it is escaped."""
    sections = [_section(network, f"n{i}") for i, network in enumerate(study.networks, start=1)]
    labels = {key: claim.label for section in sections for key, claim in section.claims.items()}
    return render_template(
        "report.html.j2",
        data=q.listed([str(one.get("name") or "this data") for one in _data(study.provenance)]),
        facts=_facts(study),
        unfinished=_unfinished(study.provenance),
        baselines=_baselines(study.provenance),
        sections=sections,
        axes=[
            (f"By {axis.what}: {axis.name}", axis.pictures(f"axis{i}"))
            for i, axis in enumerate(axes_of(study.networks), start=1)
        ],
        labels={key: labels[key] for key in _HEADINGS if key in labels},
        badges=_BADGES,
        rule=RULE,
        caveats=_caveats(study),
        method=_method(study.provenance),
        command=study.provenance.get("command"),
    )


def _section(network: Network, anchor: str) -> Section:
    judged = {claim.key: claim for claim in judge(network)}
    claims = {key: judged[key] for key in _HEADINGS if key in judged}
    pictures = illustrate(network, anchor)
    topics = [
        Topic(
            key,
            claims[key].question if key in claims else heading,
            _SENTENCES[key],
            claims.get(key),
            pictures.get(key, ()),
        )
        for key, heading in _HEADINGS.items()
        if key in claims or pictures.get(key)
    ]
    return Section(network.name, anchor, in_short(claims), claims, tuple(topics), _table(network))


def _table(network: Network) -> tuple[tuple[str, ...], ...]:
    """Returns a row per arm: name, best rate, accuracies, gap, steps, time, bytes, diverged runs."""
    rows = []
    for arm in network.arms:
        runs, summary = network.at_best(arm), network.summary(arm)
        rows.append(
            (
                arm,
                q.rate(next((run.learning_rate for run in runs.values()), math.nan)),
                q.spread(summary.test_accuracy, q.percent),
                q.spread(summary.train_accuracy, q.percent),
                q.spread(summary.generalization_gap, q.points).removesuffix(f"{q.SPACE}points"),
                _steps(summary.steps_to_target),
                q.milliseconds(summary.seconds_per_step.median),
                _megabytes(summary.bytes_kept_for_backward),
                f"{network.diverged(arm)} of {sum(run.arm == arm for run in network.runs)}",
            )
        )
    return tuple(rows)


def _megabytes(sample: Sample) -> str:
    if not sample.finite:
        return "not measured"
    return q.megabytes(sample.mean).removesuffix(f"{q.SPACE}MB")


def _steps(sample: Sample) -> str:
    reached, runs = len(sample.finite), len(sample.values)
    if not reached:
        return "not reached"
    text = q.spread(sample, q.count)
    return text if reached == runs else f"{text} ({reached} of {runs})"


def _data(provenance: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Returns what the results tell of each data set."""
    data = provenance.get("data")
    return [
        one if isinstance(one, dict) else {"name": one}
        for one in (data if isinstance(data, list) else [data])
    ]


def _baselines(provenance: Mapping[str, object]) -> str:
    """Returns the sentence on plain models of scikit-learn, empty where none was recorded."""
    sentences = []
    for data in _data(provenance):
        found = data.get("baselines")
        models = [
            f"{name} {q.percent(share)}"
            for name, share in (found.items() if isinstance(found, Mapping) else ())
            if isinstance(share, float)
        ]
        if models:
            sentences.append(f"For comparison, on the same examples of {data['name']}: {q.listed(models)}.")
    return " ".join(sentences).removesuffix(".") + " (scikit-learn)." if sentences else ""


def _facts(study: Study) -> str:
    runs = [run for network in study.networks for run in network.runs]
    diverged = sum(run.diverged for run in runs)
    parts = [
        framework_in_words(study.provenance),
        q.counted(len({network.setting.network_name for network in study.networks}), "network"),
        q.counted(len({run.arm for run in runs}), "arm"),
        q.counted(len({run.learning_rate for run in runs}), "learning rate"),
        q.counted(len({run.seed for run in runs}), "seed"),
        q.counted(len(runs), "training run") + (f", of which {diverged} diverged" if diverged else ""),
    ]
    return " · ".join(filter(None, parts))


def _unfinished(provenance: Mapping[str, object]) -> str:
    """Returns how many training runs are there while a study still runs, else nothing."""
    planned, there = provenance.get("runs_planned"), provenance.get("runs_finished")
    if not (isinstance(planned, int) and isinstance(there, int)) or there >= planned:
        return ""
    return f"{there:,} of {planned:,} training runs are finished."


def _caveats(study: Study) -> list[str]:
    """Returns what these runs cannot tell, and why, with their own numbers."""
    found = []
    is_accuracy = study.provenance.get("metric", "accuracy") == "accuracy"
    for data in _data(study.provenance):
        if isinstance(missing := data.get("classes_not_held_out"), list) and missing:
            classes = f"{'class' if len(missing) == 1 else 'classes'} {q.listed(list(map(str, missing[:5])))}"
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            found.append(
                f"The held-out examples of {data['name']} contain none of {classes}{more}: nothing here "
                "tells how well these are recognized."
            )
        size = data.get("held_out")
        if not (isinstance(size, int) and size > 0 and is_accuracy):
            continue
        error = q.points(math.sqrt(0.9 * 0.1 / size)).lstrip("+")
        found.append(
            f"The spread is over seeds, on the same {size:,} held-out examples. With other examples of the "
            f"same number, an accuracy near 90 % would change by about {error} (one standard error), but the "
            "difference between two arms would change by less."
        )
    found.append(
        "The best learning rate of an arm is chosen on the same held-out examples that are reported, for "
        "every arm alike: absolute accuracies are slightly optimistic, but comparisons hardly are."
    )
    every = {run.target_checked_every for network in study.networks for run in network.runs}
    if len(every) == 1 and (interval := every.pop()) > 1:
        found.append(
            f"Whether the target is reached is checked every {q.count(interval)} steps, and later each time "
            "the number of steps has grown by a tenth, so steps to the target are known only to within that."
        )
    found.append(
        "Many comparisons are made: with 95 % intervals, about one in twenty comparisons without a true "
        "difference will seem to show one, unless it falls short of the minimal effect."
    )
    return found


def _method(provenance: Mapping[str, object]) -> list[tuple[str, str]]:
    keys = [key for key in _METHOD if key in provenance]
    keys += [key for key in provenance if key not in _METHOD and key not in _ELSEWHERE]
    named = {**provenance, "framework": framework_in_words(provenance)}
    return [(_METHOD.get(key, key.replace("_", " ").capitalize()), _in_words(named[key])) for key in keys]


def _in_words(value: object) -> str:
    """Writes a value of the provenance: lists by comma, tables as "name value"."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return q.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return shown_number(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_in_words, value))
    return str(value)
