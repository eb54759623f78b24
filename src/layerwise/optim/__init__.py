"""Optimizers: thin `torch.optim.Optimizer` classes over pure updates. Each takes `step(closure)`."""

from layerwise.optim.altmin import AltMin
from layerwise.optim.data_parallel import DataParallel
from layerwise.optim.diag_newton import DiagNewton
from layerwise.optim.kfac import KFAC
from layerwise.optim.locoprop import LocoProp
from layerwise.optim.preconditioner import Preconditioner
from layerwise.optim.trace import Trace

__all__ = ["KFAC", "AltMin", "DataParallel", "DiagNewton", "LocoProp", "Preconditioner", "Trace"]
