"""Triton kernels, each with a plain-torch reference beside it. Triton itself is imported when a kernel first runs."""
