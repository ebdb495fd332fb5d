"""Replaces an activation module by an identity that can be turned back."""

from __future__ import annotations

from torch import nn


class FusedActivation(nn.Identity):
    """An activation module whose norm applies the activation: the same object, of another class.

    It keeps all its attributes, so that `revert` restores it.
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
