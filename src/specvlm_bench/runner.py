"""From a list of pairs to records: vLLM first, then each pair by itself, every record written as it comes."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from specvlm.core.errors import SpecVLMWarning
from specvlm.runtime.model import check_quant
from specvlm_bench import answers, vllm_plain
from specvlm_bench.clips import reachable, shown_in
from specvlm_bench.hardware import gpu_name, read_rate
from specvlm_bench.provenance import command_line, provenance, written
from specvlm_bench.speed import END_TO_END_TOKENS, Record, Spread, Watch, attempt, failed, free_memory, measure
from specvlm_bench.subjects import Source
from specvlm_bench.sweep import NO_QUANT, Cell, Sweep


class BenchWarning(SpecVLMWarning):
    """Something that was asked for is not measured."""


_VLLM = Cell("vllm-plain")
TEXT_TOKENS = 64  # of vLLM's prompts, beside the visual tokens


def run(
    sources: Sequence[Source],
    sweep: Sweep,
    device: torch.device,
    dtype: torch.dtype,
    *,
    watch: Watch,
    vllm_python: str = sys.executable,
) -> Iterator[Record]:
    """Return the records of all pairs, with their provenance. One thing at a time is on the device.

    Raises:
        ConfigError: the device has no kernel for a quantisation; found before anything is measured.
    """
    for quant in sweep.draft_quants:
        if quant != NO_QUANT:
            check_quant(quant, device)
    return _run(sources, sweep, device, dtype, watch, vllm_python)


def _run(
    sources: Sequence[Source], sweep: Sweep, device: torch.device, dtype: torch.dtype, watch: Watch, vllm_python: str
) -> Iterator[Record]:
    watch("measuring the device's read rate")
    rate = read_rate(device)
    free_memory()
    origin = provenance(command_line()) | {"gpu": gpu_name(device), "read_gb_s": rate}
    origin["versions"] |= {"cuda": torch.version.cuda}
    for source in sources:
        found = _records(source, sweep, device, dtype, rate, watch, vllm_python)
        for record in found:
            versions = origin["versions"] | record.provenance.get("versions", {})
            yield replace(record, provenance=origin | {"versions": versions})
        free_memory()


def _records(
    source: Source,
    sweep: Sweep,
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
    watch: Watch,
    vllm_python: str,
) -> Iterator[Record]:
    if _VLLM.method in sweep.methods:
        yield from _vllm(source, sweep, device, dtype, watch, vllm_python)
    if not sweep.cells():
        return
    watch(f"{source.name}: loading")
    subject = attempt(lambda: source.load(device, dtype))
    if isinstance(subject, str):
        for shown in shown_in(sweep):
            for cell in sweep.cells():
                yield failed(shown.pair(source.name), cell, shown.visual_tokens, subject)
        return
    if sweep.answer_tokens:
        yield from answers.measure(subject, sweep, watch)
    else:
        yield from measure(subject, sweep, rate, watch)


def _vllm(
    source: Source, sweep: Sweep, device: torch.device, dtype: torch.dtype, watch: Watch, python: str
) -> Iterator[Record]:
    """Yield vLLM's records, none where it is not installed or there is no GPU."""
    if device.type != "cuda" or not vllm_plain.is_installed(python):
        text = f"vllm-plain is left out: it needs a GPU, and vLLM in {python} (name another with --vllm-python)"
        warnings.warn(text, BenchWarning, stacklevel=1)
        return
    if sweep.clips:
        text = "vllm-plain is left out: it is measured by numbers of tokens, not on films"
        warnings.warn(text, BenchWarning, stacklevel=1)
        return
    watch(f"{source.name}: vLLM")
    config, number = attempt(source.config), str(dtype).removeprefix("torch.")
    if isinstance(config, str):
        for wanted in sweep.visual_tokens:
            yield failed(source.name, _VLLM, wanted, config)
        return
    counts = [reachable(config, wanted) for wanted in sweep.visual_tokens]
    lengths = [count + TEXT_TOKENS for count in counts]
    answer = attempt(lambda: vllm_plain.measure(config, number, lengths, sweep.num_tokens, sweep.slow_repeats, python))
    for place, visual_tokens in enumerate(counts):
        if isinstance(answer, str):
            yield failed(source.name, _VLLM, visual_tokens, answer)
        else:
            found = vllm_record(source.name, visual_tokens, answer["prompts"][place], sweep.num_tokens)
            yield replace(found, provenance={"versions": {"vllm": answer["version"]}})


def vllm_record(pair: str, visual_tokens: int, times: dict[str, Any], num_tokens: int) -> Record:
    """Return the record of one prompt length of vllm_peer.py's answer."""
    rounds = zip(times["first_s"], times["all_s"], strict=True)
    spread = Spread.of([1e3 * (whole - first) / (num_tokens - 1) for first, whole in rounds])
    first = statistics.median(times["first_s"])
    return Record(
        pair,
        visual_tokens,
        _VLLM.method,
        ms_per_token=spread,
        ttft_s={"prefill": first},
        end_to_end_s=first + (END_TO_END_TOKENS - 1) * spread.median / 1e3,
        prompt_tokens=times["prompt_tokens"],
        num_tokens=num_tokens,
    )


def write(records: Iterable[Record], out: str | None) -> Iterator[dict[str, Any]]:
    """Return the records as plain JSON types, each written to `out` as a line before the next is measured.

    Raises:
        ConfigError: `out` cannot be written; found before anything is measured.
    """
    return written(records, out)
