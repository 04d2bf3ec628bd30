"""Engines that run models, each in a process of its own."""

from pxd.executors.choice import choose_executor
from pxd.executors.inspection import describe_model, measure_device, quantize_model
from pxd.executors.process import open_executor

__all__ = ["choose_executor", "describe_model", "measure_device", "open_executor", "quantize_model"]
