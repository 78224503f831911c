"""Triton kernels, each with a plain-torch reference beside it. Triton itself is imported when a kernel first runs."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None  # it comes with torch's GPU builds; without it torch's own functions serve
