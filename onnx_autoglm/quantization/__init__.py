"""Quantization: places, ranges, weights, the choice of schemes, and what the result promises."""
