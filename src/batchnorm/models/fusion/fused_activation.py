"""What stands where an activation module was: an identity that can become it again."""

from __future__ import annotations

from torch import nn


class FusedActivation(nn.Identity):
    """The activation module itself, of another class: its norm applies it now.

    Everything that it was stays in it, so that `revert` gives it back as it was.
    """

    was: type[nn.Module]

    def extra_repr(self) -> str:
        """The class that it was."""
        return f"{self.was.__name__}, applied by the layer before it"


def silence(act: nn.Module) -> FusedActivation:
    """Turn an activation module into an identity, in place."""
    vars(act)["was"] = type(act)
    act.__class__ = FusedActivation
    assert isinstance(act, FusedActivation)
    return act


def restore(act: FusedActivation) -> None:
    """Turn the identity into the activation module that it was."""
    act.__class__ = vars(act).pop("was")
