"""Between rosaq's layout and others': GPTQ, AWQ and compressed-tensors in; dense and compressed-tensors out."""

from rosaq.conversion.directory import Conversion, convert

__all__ = ["Conversion", "convert"]
