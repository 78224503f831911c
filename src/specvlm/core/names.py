"""The names that come with this package, so that a wrong one on a command line is answered without torch.

What they name registers itself where it is written; a test holds both against each other.
"""

PRUNERS = ("attention", "frame", "none", "random", "uniform", "verifier", "window")
DRAFTERS = {"model": True, "self": True, "lookup": False, "none": False}  # whether they see what a pruner keeps
QUANTS = ("fp8", "int8", "int4")  # weight-only formats of a draft
DTYPES = ("float32", "bfloat16", "float16")
