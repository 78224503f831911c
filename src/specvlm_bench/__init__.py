"""Measurements, one module a question; each is a command of `specvlm bench`."""
