"""What a calibration found: how far each layer's running statistics were from the data's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after.

    Attributes:
        name: qualified name in the model.
        values: number of values per channel that the statistics rest on.
        mean_shift: largest |new mean - old mean| over the channels, in standard deviations of the data.
        std_ratio: new standard deviation over old, of the channel where they differ most.
        exact: no other normalization ran before this one, so its statistics do not depend on how the data was
            split into batches.
    """

    name: str
    values: int
    mean_shift: float
    std_ratio: float
    exact: bool


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did; `print` shows it as a table.

    Attributes:
        samples: number of samples that went through the model.
        batches: number of batches.
        layers: the layers whose running statistics were set, in the order of the model.
        unreached: names of the layers that no sample reached; theirs are as before.
        frozen: names of the layers that are frozen (`Running()`; in Keras `trainable=False`): as before.
    """

    samples: int
    batches: int
    layers: tuple[LayerChange, ...]
    unreached: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("layer", "values per channel", "mean moved by", "std became")
        rows = [
            (
                layer.name + ("" if layer.exact else " *"),
                f"{layer.values:,}",
                f"{layer.mean_shift:.3g} std",
                f"{layer.std_ratio:.3g}×",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            f"Calibrated {len(self.layers)} layers on {self.samples:,} samples in {self.batches:,} batches."
        ]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        if any(not layer.exact for layer in self.layers):
            lines.append(
                "* normalized inputs: depends on how the data was split into batches; larger is closer."
            )
        if self.unreached:
            lines.append(f"Not reached, left as before: {', '.join(self.unreached)}.")
        if self.frozen:
            lines.append(f"Frozen, left as before: {', '.join(self.frozen)}.")
        return "\n".join(lines)
