"""The commands of `specvlm bench`: their options, and what they call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specvlm.cli import console
from specvlm.cli.options import (
    MODEL_OPTIONS,
    PARTS,
    add_command,
    add_data,
    add_model,
    add_settings,
    check,
    numbers,
    read_data,
    run_files,
)
from specvlm.cli.progress import Status
from specvlm.core import checks
from specvlm.core.config import EngineConfig
from specvlm.core.errors import ConfigError, MediaError
from specvlm_bench import published, style
from specvlm_bench.sweep import Sweep


def add(commands: Any) -> None:
    """Add `bench` and `report` to the command line: the entry point in the group `specvlm.commands`."""
    bench = commands.add_parser("bench", help="measure", description="Measurements, one a question.")
    questions = bench.add_subparsers(metavar="QUESTION", dest="question", required=True)
    _add_quality(questions)
    _add_speed(questions)
    _add_report(commands)


def _add_report(commands: Any) -> None:
    text = "tables, plots and a page of runs of bench quality; two or more are compared with the first"
    parser = add_command(commands, "report", _report, text)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="the --out of bench quality")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where they go [default: the first DIR]")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")


def _add_quality(questions: Any) -> None:
    text = "answer a data set by every method: acceptance, time, memory; exit 1 if fp32 words are not plain decoding's"
    parser = add_command(questions, "quality", _bench_quality, text)
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    text = "journal, report and pictures; a run that was stopped goes on there"
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=text)
    add_data(parser)
    text = "a published experiment's data, prompt and settings: paper-7b, paper-32b or paper-72b"
    parser.add_argument("--preset", metavar="NAME", help=text)
    group = parser.add_argument_group("Methods")
    text = "plain, generate (transformers' own), chain and tree (unpruned), auto, or a pruner or drafter, each perhaps "
    text += "with @keep_ratio [default: plain,generate,chain,tree,verifier,uniform,auto]"
    group.add_argument("--methods", metavar="A,B", help=text)
    text = "what each pruner is crossed with [default: that of --keep-ratio]"
    group.add_argument("--keep-ratios", metavar="X,Y", default=argparse.SUPPRESS, help=text)
    text = "one of your own: a name, and what it has otherwise than tree"
    group.add_argument(
        "--method", metavar=("NAME", "setting=value"), dest="own", nargs="+", action="append", default=[], help=text
    )
    text = "Python file that registers pruners, drafters or methods"
    group.add_argument("--load", metavar="FILE.py", action="append", default=[], help=text)
    text = "drafted by every method without a tree of its own: as for describe [default: paper]"
    group.add_argument("--tree", metavar="TREE", default=argparse.SUPPRESS, help=text)
    group = parser.add_argument_group("Protocol")
    group.add_argument("--seed-order", metavar="N", type=int, default=0, help="seed of the methods' order [default: 0]")
    text = "prefill a sample once for all methods: the same counts sooner, and no times"
    group.add_argument("--untimed", action="store_true", help=text)
    text = "samples whose kept tokens are drawn [default: 3]"
    group.add_argument("--overlays", metavar="N", type=int, default=3, help=text)
    group.add_argument(
        "--no-report", action="store_true", help="the journal alone; specvlm report makes the rest of it"
    )
    add_model(parser, has_draft=True)
    for part in ("video", "prune", "sampling", "run"):
        add_settings(parser, PARTS[part], but=("pruner",))  # a method's own


def _add_speed(questions: Any) -> None:
    text = "time decoding, its passes beside the least that reading weights takes, and other engines on the same models"
    parser = add_command(questions, "speed", _bench_speed, text)
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    text = "planted pairs, full-size models with random weights whose text is known [default: every family's]"
    parser.add_argument("--pairs", metavar="A,B", help=text)
    parser.add_argument("--tiny", action="store_true", help="shrink the planted models: a check, no measurement")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the planted weights [default: 0]")
    group = parser.add_argument_group("Real checkpoints instead of planted pairs")
    group.add_argument("--target", metavar="TARGET", help="Hugging Face directory or hub id")
    group.add_argument("--draft", metavar="DRAFT", help="the same for the draft")
    help = "films to show them [default: random smooth frames of --visual-tokens, which tell nothing of acceptance]"
    group.add_argument("--clips", metavar="VIDEO", nargs="+", default=[], help=help)
    group = parser.add_argument_group("What is measured")
    group.add_argument("--visual-tokens", metavar="N,N", help="[default: 16384]")
    group.add_argument("--keep-ratios", metavar="X,Y", default="0.1", help="[default: %(default)s]")
    help = "[default: all]"
    group.add_argument("--methods", metavar="A,B", help=help)
    help = "drafted trees; the chain method takes the chains, the tree method the others [default: paper chain:5]"
    group.add_argument("--trees", metavar="TREE", nargs="+", help=help, default=argparse.SUPPRESS)
    help = "weight-only quantisations of the draft: none, fp8, int8, int4 [default: none]"
    group.add_argument("--draft-quants", metavar="A,B", help=help)
    help = (
        "how often the auto method's planted draft is right: published (as in published runs), hopeless (hardly ever), "
        "changing (both by turns) [default: published]"
    )
    group.add_argument("--planted-drafts", metavar="A,B", help=help)
    help = (
        "instead: time whole answers of so many tokens, from the frames to the last word, each method in turn "
        "[methods by default: plain,auto]"
    )
    group.add_argument("--answer-tokens", metavar="N,N", help=help)
    help = "tokens of an answer [default: 256]"
    group.add_argument("--tokens", dest="num_tokens", type=int, metavar="N", help=help, default=argparse.SUPPRESS)
    help = "counted answers of each method [default: 5]"
    group.add_argument("--repeats", type=int, metavar="N", help=help, default=argparse.SUPPRESS)
    help = "counted prefills, and answers of other engines [default: 2]"
    group.add_argument("--slow-repeats", type=int, metavar="N", help=help, default=argparse.SUPPRESS)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [default: auto]")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 [default: auto]")
    help = "interpreter that has vLLM [default: this one]"
    group.add_argument("--vllm-python", metavar="PYTHON", default=sys.executable, help=help)
    group = parser.add_argument_group("Results")
    group.add_argument("--out", metavar="FILE.jsonl", help="write a line per measurement as it comes")
    group.add_argument("--plots", metavar="DIR", help="draw PNG files there; needs specvlm[bench]")
    help = "measure nothing: take the lines of an earlier run, for table and plots"
    group.add_argument("--from", dest="lines", metavar="FILE.jsonl", nargs="+", help=help)


def _bench_quality(args: argparse.Namespace, status: Status) -> int:
    from specvlm_bench import presets
    from specvlm_bench.journal import Journal

    check(args)
    if args.overlays < 0:
        raise ConfigError(f"overlays={args.overlays} is not allowed: 0 or more")
    loaded = run_files(args.load)
    preset = presets.preset(args.preset) if args.preset else None
    defaults = {"data": preset.data, "ask": preset.ask} if preset else {}
    shared = {**(preset.settings if preset else {}), **args.settings}
    methods, shared = _methods(args, shared)
    checks.folder_to_write(args.out)
    data = read_data(args, status, **defaults)
    if not args.no_report:
        style.require_matplotlib("a report needs", ", or leave it out: --no-report")  # before anything is measured
    import torch

    from specvlm.engine.api import SpecVLM
    from specvlm_bench import quality

    console.raise_on_signals()
    options = {name: getattr(args, name) for name in MODEL_OPTIONS if hasattr(args, name)}
    protocol = quality.Protocol(methods, shared, args.seed_order, not args.untimed, args.overlays, loaded)
    model = SpecVLM.from_pretrained(**options, watch=status.show)
    quality.check(model, protocol)
    with Journal(args.out, quality.origin(model, data, protocol)) as journal:
        lines = quality.run(model, data, protocol, journal, watch=status.progress)
    status.clear()
    if not args.no_report:
        from specvlm_bench import report

        print(report.build([args.out], args.out).markdown, end="")
    is_exact = model.target.dtype == torch.float32
    return 1 if is_exact and any(line["kind"] == "difference" for line in lines) else 0


def _methods(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the methods, and the settings that all share: what a method decides is taken out of these."""
    from specvlm_bench import methods

    shared = {name: value for name, value in settings.items() if name not in methods.DECIDES}
    tree = settings.get("tree", "paper")
    ratios = numbers(args, "keep_ratios", float) if hasattr(args, "keep_ratios") else (settings.get("keep_ratio", 0.1),)
    found = methods.named(args.methods.split(",") if args.methods else methods.DEFAULT, ratios, tree)
    for name, *own in args.own:
        if name in found:
            raise ConfigError(f"method {name!r} is named twice: give it another name")
        found[name] = methods.written(name, own, tree)
    for settings in found.values():
        checks.settings(EngineConfig().replace(**{**shared, **settings}), is_extended=False)
    return found, shared


def _bench_speed(args: argparse.Namespace, status: Status) -> int:
    if args.target and args.pairs:
        raise ConfigError(f"pairs={args.pairs!r} is not allowed beside --target: leave one of them out")
    if bool(args.target) != bool(args.draft):
        raise ConfigError("bench speed needs a target and a draft: give both --target and --draft, or neither")
    from specvlm_bench import plots, summary

    what = None if args.lines else _sweep(args)
    if args.plots:
        checks.folder_to_write(args.plots)
        plots.check()  # before anything is measured
    lines: list[summary.Line] = []
    try:
        lines.extend(summary.read(args.lines) if what is None else _speed_lines(args, what, status))
    finally:  # what was measured is shown, also where the run was interrupted
        status.clear()
        if lines:
            print(summary.table(lines), end="")
    if args.plots:
        plots.draw(lines, args.plots)
    return 0 if all(line.get("error") is None and line.get("follows_plant") is not False for line in lines) else 1


def _sweep(args: argparse.Namespace) -> Sweep:
    """Return what the options say, once all is looked through that can be without torch."""
    optional = ("num_tokens", "repeats", "slow_repeats", "trees")
    given: dict[str, Any] = {name: getattr(args, name) for name in optional if hasattr(args, name)}
    given |= {"trees": tuple(given["trees"])} if "trees" in given else {}
    for name in ("methods", "draft_quants", "planted_drafts"):
        given |= {name: tuple(getattr(args, name).split(","))} if getattr(args, name) else {}
    if args.target and args.planted_drafts:
        problem = f"planted_drafts={args.planted_drafts!r} is not allowed beside --target"
        raise ConfigError(f"{problem}: leave one of them out")
    given |= {"planted_drafts": ()} if args.target else {}
    _check_clips(args)
    if args.answer_tokens:
        _check_answers(args)
        given = {"methods": ("plain", "auto"), **given, "answer_tokens": numbers(args, "answer_tokens", int)}
    args.visual_tokens = args.visual_tokens or "16384"
    counts, ratios = (numbers(args, name, kind) for name, kind in (("visual_tokens", int), ("keep_ratios", float)))
    what = Sweep(counts, ratios, clips=tuple(args.clips), **given)
    check(args)
    for name in _pairs(args):
        published.pair(name)
    if args.out:
        checks.file_to_write(args.out)
    return what


def _pairs(args: argparse.Namespace) -> list[str]:
    """Return the names of planted pairs."""
    return [] if args.target else (args.pairs or published.DEFAULT_PAIRS).split(",")


def _speed_lines(args: argparse.Namespace, what: Sweep, status: Status) -> Iterator[dict[str, Any]]:
    """Measure what was asked for."""
    from specvlm.runtime.model import resolve_device, resolve_dtype
    from specvlm_bench import runner, subjects

    console.raise_on_signals()
    if args.target:
        sources: list[subjects.Source] = [subjects.CheckpointSource(args.target, args.draft)]
    else:
        sources = [subjects.PlantedSource.of(name, is_tiny=args.tiny, seed=args.seed) for name in _pairs(args)]
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    records = runner.run(sources, what, device, dtype, watch=status.show, vllm_python=args.vllm_python)
    return runner.write(records, args.out)


def _check_answers(args: argparse.Namespace) -> None:
    """Refuse what has no effect on whole answers."""
    for name in ("num_tokens", "slow_repeats", "plots"):
        if getattr(args, name, None) is not None:
            option = {"num_tokens": "tokens"}.get(name, name)
            problem = f"{option}={getattr(args, name)} is not allowed beside --answer-tokens"
            raise ConfigError(f"{problem}: leave one of them out")


def _check_clips(args: argparse.Namespace) -> None:
    if args.clips and not args.target:
        raise ConfigError(f"clips={args.clips[0]!r} is not allowed for planted pairs: give --target and --draft")
    if args.clips and args.visual_tokens:
        raise ConfigError(f"visual_tokens={args.visual_tokens} is not allowed beside --clips: leave one of them out")
    if missing := [clip for clip in args.clips if "://" not in clip and not Path(clip).is_file()]:
        raise MediaError(f"{missing[0]!r} does not exist: check the path")


def _report(args: argparse.Namespace, status: Status) -> int:
    from specvlm_bench import journal

    for directory in args.directories:
        journal.file_in(directory)
    checks.folder_to_write(args.output or args.directories[0])
    from specvlm_bench import report

    found = report.build(args.directories, args.output or args.directories[0])
    status.clear()
    print(found.markdown, end="")
    return 0
