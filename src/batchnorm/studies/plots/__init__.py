"""Pictures of a study, as inline SVG that follows the page's colours, each with a description in numbers."""

from collections.abc import Callable

from batchnorm.studies.verdicts.results import Network

from . import layers, multiples, rows
from .axes import Axis, axes_of
from .canvas import Picture

__all__ = ["Axis", "Picture", "axes_of", "illustrate"]

# Which pictures stand with which claim.
_PICTURES: dict[str, tuple[Callable[[str, Network], Picture | None], ...]] = {
    "speed": (multiples.accuracy_curves, multiples.loss_curves, rows.steps_to_target),
    "rates": (multiples.accuracy_by_rate,),
    "accuracy": (rows.differences,),
    "gradients": (layers.gradient_norms,),
    "drift": (layers.input_drift,),
    "statistics": (rows.statistics_at_test_time,),
    "cost": (rows.cost,),
}


def illustrate(network: Network, prefix: str) -> dict[str, tuple[Picture, ...]]:
    """Draws what there is to show of a network, by the claim that it belongs to.

    Args:
        network: the runs of one network.
        prefix: unique within the page; the ids in the SVGs start with it.
    """
    found = {}
    for topic, painters in _PICTURES.items():
        pictures = (paint(f"{prefix}-{topic}{i}", network) for i, paint in enumerate(painters, start=1))
        found[topic] = tuple(picture for picture in pictures if picture is not None)
    return found
