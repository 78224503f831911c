"""The samples of a quality run: the bundled clips, a JSONL of your own, or one of five published sets.

    read()                                    the 40 held-out clips of the bundled pair
    read("questions.jsonl")                   lines {"video", "prompt", "id"}
    read("mvbench", "/data/MVBench")          a published set in the layout of its hub repository, archives unpacked
    read("mvbench", limit=50)                 the same from the hub; only the files that these samples need

What is malformed becomes a Problem with its place, and the rest is read.
"""

from __future__ import annotations

from pathlib import Path

from specvlm.core.errors import ConfigError
from specvlm_bench.data.lines import read_lines
from specvlm_bench.data.samples import ASK, DESCRIBE, Data, Problem, Sample
from specvlm_bench.data.sets import SETS, read_set

__all__ = ["ASK", "DESCRIBE", "NAMES", "Data", "Problem", "Sample", "read"]

BUNDLED = "bundled"
NAMES = (BUNDLED, *SETS)


def read(
    name: str | None = None, directory: str | None = None, *, ask: str = "question", limit: int | None = None
) -> Data:
    """Return the samples of a data set, and what it does not give.

    Args:
        name: "bundled" (or None), a path that ends in .jsonl, or a published set (NAMES; case does not matter).
        directory: where a published set lies; None fetches what is needed from the hub.
        ask: "question" asks the data's own questions, in the published multiple-choice format; "describe" asks DESCRIBE
            once a video. VideoDetailCaption's own questions ask for a description, so they stay; so do the prompts of
            a JSONL, whose lines without one ask DESCRIBE.
        limit: no more samples than this, evenly spread over the data, which may be sorted by task or length.

    Raises:
        ConfigError: a name or value is not allowed, a file cannot be read or fetched, or no sample is left.
    """
    if ask not in ASK:
        raise ConfigError(f"ask={ask!r} is not allowed: {' or '.join(ASK)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} is not allowed: at least 1")
    known = (name or BUNDLED).lower()
    if known in SETS:
        return read_set(known, directory, ask=ask, limit=limit)
    if directory is not None:
        raise ConfigError(f"directory={directory!r} is not allowed here: it is for {', '.join(SETS)}")
    if known == BUNDLED:
        from specvlm.engine.pair import bundled  # imports torch

        return read_lines(BUNDLED, Path(bundled("clips")) / "clips.jsonl", video="file", limit=limit)
    if name is not None and known.endswith(".jsonl"):
        return read_lines(name, Path(name), prompt=DESCRIBE if ask == "describe" else None, limit=limit)
    raise ConfigError(f"data={name!r} is unknown: give {', '.join(NAMES)}, or a file that ends in .jsonl")
