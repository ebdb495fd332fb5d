"""The calls and values of a torch model: what a traced forward and a recorded run have in common."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from batchnorm.folding import flow
from batchnorm.folding.flow import Axes as Axes
from batchnorm.folding.flow import Concatenation as Concatenation
from batchnorm.folding.flow import Sum as Sum
from batchnorm.folding.flow import joined as joined

Call: TypeAlias = flow.Call[nn.Module]
Flow: TypeAlias = flow.Flow[nn.Module]
Value: TypeAlias = flow.Value[nn.Module]
