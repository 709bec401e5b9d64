"""From a dense model directory to a quantised one: the only place that knows the order of the steps."""

from rosaq.pipeline.quantize import ProgressEvent, QuantizeResult, quantize

__all__ = ["ProgressEvent", "QuantizeResult", "quantize"]
