"""The qualified name of a layer, for error messages.

A module does not know its parents, but while an error is being raised, the modules that called it are on the
stack. The outermost of them that contains the layer is the model.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn
from torch._compile import _disable_dynamo


@_disable_dynamo  # Dynamo cannot trace frames, and would warn; this decorator does not import it
def qualified_name(layer: nn.Module) -> str:
    """Return `features.3 (BatchNorm2d)` within the outermost module on the call stack, else `BatchNorm2d`."""
    kind = type(layer).__name__
    name = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            name = next((path for path, module in caller.named_modules() if module is layer), name)
        frame = frame.f_back
    return f"{name} ({kind})" if name else kind
