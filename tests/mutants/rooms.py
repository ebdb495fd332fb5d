"""The parts of the code that mutants are made in, and the tests that must catch them: the quick ones first.

A survivor costs all of a room's tests, and so does the code as it is. They should take two minutes at
most, so the slowest cases are left out where quicker ones of the same test try the same code.

A file belongs to the first room that names it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path("src/batchnorm")


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of pytest.

    Args:
        tests: paths.
        choice: among their tests (`-k`).
        backend: of Keras.
        only: patterns within src/batchnorm; mutants of other files are not tried with it.
    """

    tests: tuple[str, ...]
    choice: str = ""
    backend: str = ""
    only: tuple[str, ...] = ("*",)

    def tries(self, file: Path | None) -> bool:
        """Return whether mutants of a file are tried with it; None is the code as it is."""
        return file is None or any(
            fnmatch.fnmatch(str(file), f"{PACKAGE}/{pattern}") for pattern in self.only
        )


@dataclasses.dataclass(frozen=True)
class Room:
    """A part of the code, and what tests it.

    Args:
        name: for reports and `--room`.
        files: patterns within src/batchnorm.
        runs: calls of pytest, until one fails.
        patience: seconds that a mutant may take beyond one and a half times the unmutated code's.
    """

    name: str
    files: tuple[str, ...]
    runs: tuple[Run, ...]
    patience: float = 60.0


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names)


_NOT_COMPILED = "not (test_trouble and compiled)"
_KERAS_LAYERS = _in(
    "keras", "policy_options", "masks", "numbers", "layers", "policies", "stock_tests", "conventions",
    "synced_policies", "shuffled",
)  # fmt: skip
# Which backends run what of the layer: on torch our kernels do most of it.
_KERAS_BY_TORCH = ("keras/layers.py", "keras/torch_backend.py", "keras/moments.py", "keras/norms.py")
_KERAS_BY_OTHERS = ("keras/layers.py", "keras/ops_backend.py", "keras/moments.py", "keras/synchronized.py")
_KERAS_VERBS = _in(
    "keras", "fold", "fold_left", "fold_copy", "calibrate", "calibrate_data", "calibrate_in_fit", "freeze",
    "calibrate_distributed", "merge_statistics",
)  # fmt: skip

ROOMS = (
    Room(
        "masks",
        ("torch/contexts/masks.py", "torch/contexts/checkpointing.py", "torch/contexts/domains.py",
         "torch/contexts/samples.py", "models/mask.py", "models/domain.py", "models/contexts.py",
         "keras/batch_layout.py"),
        (
            Run((*_in("torch", "masks", "masks_of_layers", "domains", "domains_of_samples", "domain_affine",
                      "checkpoint", "checkpoint_contexts"),
                 *_in("models", "calibrate_masked")), only=("torch/*", "models/*")),
            Run(_in("models", "arguments"), choice="mask or lengths or other_functions", only=("models/*",)),
            Run(_in("keras", "masks", "policy_options"), backend="torch", only=("keras/*",)),
            Run(_in("keras", "masks", "policies"), backend="tensorflow", only=("keras/*",)),  # unknown shapes
        ),
    ),
    Room(
        "running statistics",
        ("torch/running_stats.py", "torch/moments.py", "kernels/cpu/running.py", "kernels/gpu/running.py",
         "torch/contexts/accumulation.py", "torch/tracing.py", "models/accumulate.py",
         "keras/moving_statistics.py", "statistics/running.py"),
        (
            Run((*_in("torch", "statistics", "warm_start", "accumulate"), *_in("kernels", "running"),
                 *_in("statistics", "statistics"),
                 *_in("torch", "checkpoint", "checkpoint_contexts", "against_reference", "trouble")),
                choice=f"{_NOT_COMPILED} and not (test_running and gpu)",
                only=("torch/*", "models/*", "statistics/*", "kernels/cpu/*")),
            Run((*_in("torch", "gpu"), *_in("kernels", "running")), choice="gpu", only=("kernels/gpu/*",)),
            Run(_in("keras", "numbers"), backend="jax", only=("keras/*",)),
            Run(_in("keras", "numbers", "warm_start"), backend="torch", only=("keras/*",)),
            Run(_in("keras", "policies"), choice="in-turn", backend="jax", only=("keras/*",)),
        ),
        patience=240.0,
    ),
    Room(
        "kernels eager",
        ("kernels/eager.py", "kernels/activations.py", "kernels/layout.py", "kernels/choose.py"),
        (
            Run((*_in("kernels", "activations", "choose", "engines", "running", "again"),
                 *_in("torch", "layouts", "against_reference", "accuracy", "functional_transforms")),
                choice="not ((test_engines or test_running) and gpu)"),
        ),
    ),
    Room(
        "kernels CPU",
        ("kernels/cpu/*.py",),
        (
            Run((*_in("kernels", "engines", "running", "groups_of_a_task", "cpu", "again"),
                 *_in("torch", "against_reference", "accuracy", "prepared_calls", "prepared_tensors",
                      "prepared_bound")),
                choice="not ((test_engines or test_running) and (gpu or eager))"),
        ),
        patience=300.0,
    ),
    Room(
        "kernels GPU",
        ("kernels/gpu/*.py",),
        (
            Run((*_in("torch", "gpu"), *_in("kernels", "engines", "gpu", "running")),
                choice="gpu and not test_every_kernel_compiles"
                " and not ((test_engines or test_running) and default)"),
        ),
    ),
    Room(
        "ranks",
        ("torch/collectives/*.py", "torch/sync.py", "statistics/synced.py"),
        (
            Run(_in("statistics", "statistics"), only=("statistics/*",)),
            Run((*_in("torch", "gloo_transport", "lost_ranks"), *_in("models", "synchronized"),
                 *_in("torch", "synced", "contexts_on_ranks", "collectives", "ddp"))),
        ),
    ),
    Room(
        "calibration",
        ("models/calibrate.py", "models/calibration/*.py", "models/merge_statistics.py",
         "statistics/calibration.py"),
        (
            Run(_in("models", "calibrate", "calibrate_masked", "calibrate_resumed", "calibrate_use",
                    "calibrate_layerwise", "calibrate_layerwise_disk", "policies", "merge_statistics",
                    "calibrate_ranks")),
        ),
    ),
    Room(
        "doctor",
        ("doctor/*.py", "models/diagnose.py", "models/diagnosis/*.py", "models/norms/state.py",
         "keras/diagnose.py", "keras/diagnosis/*.py"),
        (
            Run(_in("models", "diagnose", "diagnose_data", "diagnose_faults", "diagnose_ranks"),
                only=("doctor/*", "models/*")),
            Run(_in("keras", "diagnose"), backend="torch", only=("doctor/*", "keras/*")),
        ),
    ),
    Room(
        "monitor and callbacks",
        ("models/monitor.py", "keras/monitor.py", "loggers.py", "integrations/*.py"),
        (
            Run(_in("models", "monitor"), only=("models/*", "loggers.py")),
            Run(_in("keras", "monitor"), backend="torch", only=("keras/*",)),
            Run(_in("integrations", "lightning", "transformers"), only=("integrations/*", "models/*")),
        ),
        patience=120.0,
    ),
    Room(
        "statistics and policies",
        ("statistics/*.py", "torch/policy_step.py", "torch/autograd.py", "torch/composite.py"),
        (
            Run((*_in("statistics", "statistics"),
                 *_in("torch", "policies", "ghost", "policies_against_reference", "against_reference",
                      "layers", "functional_transforms", "policies_transformed", "determinism", "errors",
                      "options_travel"),
                 *_in("models", "policies", "freeze"), *_in("torch", "trouble", "activation_mask")),
                choice=_NOT_COMPILED),
        ),
    ),
    Room(
        "layers",
        ("torch/layers.py", "torch/checks.py", "torch/dispatch.py", "torch/functional.py",
         "torch/call.py", "torch/lazy.py", "torch/stored_state.py"),
        (
            Run(_in("torch", "errors", "layouts", "layers", "modules", "axis", "statistics", "policies",
                    "against_reference", "masks_of_layers", "domains", "functional_transforms", "ghost",
                    "prepared_calls", "prepared_tensors", "options_travel", "export", "opinfo", "trouble",
                    "checkpoint", "compile"),
                choice=f"{_NOT_COMPILED} and not with_inductor"),
            Run(_in("models", "calibrate_masked"), only=("torch/layers.py",)),  # who asks for a layer's mask
        ),
    ),
    Room(
        "folding and fusion",
        ("folding/*.py", "models/fold.py", "models/folding/*.py", "models/verify.py", "models/fuse.py",
         "models/fusion/*.py", "models/graph/*.py", "models/norms/activations.py"),
        (Run(_in("models", "fold", "fold_left", "fold_joined", "fold_parallel", "fuse", "verbs", "fold_copy",
                 "policies", "fold_zoo")),
         Run(_in("keras", "fold", "fold_left"), backend="torch", only=("folding/*",))),
    ),
    Room(
        "Keras layers",
        ("keras/layers.py", "keras/ops_backend.py", "keras/moments.py", "keras/synchronized.py",
         "keras/torch_backend.py", "keras/norms.py"),
        (
            Run(_KERAS_LAYERS, backend="torch", only=_KERAS_BY_TORCH),
            Run(_in("keras", "numbers", "masks", "policy_options", "policies"), backend="jax",
                only=_KERAS_BY_OTHERS),
            Run(_in("keras", "synchronized", "synced_policies", "numbers"), backend="tensorflow",
                only=_KERAS_BY_OTHERS),
        ),
    ),
    Room(
        "Keras verbs",
        ("keras/*.py", "keras/calibration/*.py"),
        (Run(_KERAS_VERBS, backend="torch"),
         Run(_in("keras", "fold", "calibrate", "calibrate_distributed"), backend="tensorflow"),
         Run(_in("keras", "fold", "calibrate", "calibrate_distributed"), backend="jax")),
    ),
    Room(
        "claims",
        ("claims/rules.py", "claims/summary.py", "claims/runner.py", "claims/tools/*.py"),
        (Run(_in("claims", "rules", "tools", "claims")),),
    ),
)  # fmt: skip

# Speed alone hangs on these.
_WITHOUT = ("kernels/cpu/huge_pages.py",)


def files(root: Path) -> Iterator[tuple[Room, Path]]:
    """Return every file that mutants are made of, relative to `root`, each with its room."""
    seen = {PACKAGE / name for name in _WITHOUT}
    for room in ROOMS:
        for pattern in room.files:
            for path in sorted((root / PACKAGE).glob(pattern)):
                name = path.relative_to(root)
                if name not in seen:
                    seen.add(name)
                    yield room, name
