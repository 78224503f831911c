"""The command line: `specvlm describe`, `compare`, `inspect` and `bench`.

The answer goes to stdout, all else to stderr. Options are the fields of the configs. Torch and transformers are
imported when a command runs, so that help and bad options answer at once. An error is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_origin, get_type_hints

from specvlm.config import EngineConfig, kind_of
from specvlm.errors import ConfigError, MediaError, SpecVLMError, memory_errors

if TYPE_CHECKING:
    from specvlm.account import Generation
    from specvlm.engine import SpecVLM
    from specvlm.text import Chunk

PARTS: dict[str, Any] = get_type_hints(EngineConfig)  # "video" -> VideoConfig, ...
MODEL_OPTIONS = ("target", "draft", "device", "draft_device", "draft_quant", "dtype")
NOT_WRITTEN = {
    errno.EPIPE: "stdout was closed before all was written: read it to its end",
    errno.ENOSPC: "no space left on the device: free some, or write elsewhere",
}
STAGES = {
    "read": "reading the video",
    "encode": "encoding the frames",
    "prefill": "prefilling the target",
    "prune": "pruning",
    "draft_prefill": "prefilling the draft",
    "calibrate": "timing passes, once",
    "capture": "capturing CUDA graphs, once",
    "decode": "decoding",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 (`compare` found a difference), 2 (an error) or 130 (interrupted)."""
    try:
        args = _parse(argv)
        status = Status(is_quiet=args.quiet)
        with _quiet_libraries(status), memory_errors(), status:
            status.show("loading the libraries...")
            code: int = args.run(args, status)
            sys.stdout.flush()
        return code
    except SpecVLMError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would raise again
        return _fail(NOT_WRITTEN[error.errno])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int = 2) -> int:
    print(f"specvlm: {' '.join(message.split())}", file=sys.stderr)
    return code


class Status:
    """One line on stderr that says what is going on; only where stderr is a terminal."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self._is_live = not is_quiet and sys.stderr.isatty()
        self._shown = ""

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Put this on the line."""
        text = text[:79]
        if self._is_live and text != self._shown:
            print(f"\r{text.ljust(len(self._shown))}", end="", file=sys.stderr, flush=True)
            self._shown = text

    def clear(self) -> None:
        """Empty the line, before something else is written."""
        if self._shown:
            print(f"\r{' ' * len(self._shown)}\r", end="", file=sys.stderr, flush=True)
            self._shown = ""

    def close(self) -> None:
        """Empty the line for good: the same terminal may show the answer from now on."""
        self.clear()
        self._is_live = False

    def stages(self, prefix: str = "") -> Callable[[str], None]:
        """Return an observer of a request's stages."""
        return lambda name: self.show(f"{prefix}{STAGES[name]}...")

    def warn(self, text: str) -> None:
        """Write a warning on a line of its own."""
        if not self.is_quiet:
            self.clear()
            print(f"specvlm: warning: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def _quiet_libraries(status: Status) -> Iterator[None]:
    """Show our own warnings on one line and nobody else's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category.__module__.startswith("specvlm."):
            status.warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


# Options


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # a closed stdout is found here, not while Python shuts down
        super().exit(status, message)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; see specvlm {args.command} --help")
    args.settings = _settings(args)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="specvlm", description="Lossless speculative decoding for video language models.")
    parser.add_argument("--version", action="version", version=f"specvlm {version('specvlm')}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    def add(name: str, run: Callable[..., int], help: str, *parts: str) -> argparse.ArgumentParser:
        usage = f"specvlm {name} [options] VIDEO [PROMPT]{' -o FILE.png' if name == 'inspect' else ''}"
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", usage=usage)
        command.set_defaults(run=run)
        _add_source(command)
        _add_model(command, has_draft="draft" in parts)
        for part in parts:
            _add_settings(command, PARTS[part])
        return command

    describe = add("describe", _describe, "answer a question about a video", *PARTS)
    describe.add_argument("--stats", action="store_true", help="print counts, seconds and memory to stderr")
    text = "print to stderr what was drafted in each round, and why"
    describe.add_argument("--explain", action="store_true", help=text)
    describe.add_argument(
        "--no-draft", dest="drafter", action="store_const", const="none", default=argparse.SUPPRESS,
        help="plain decoding: load no draft (the same as --drafter none)",
    )  # fmt: skip
    text = "run plain and speculative decoding in turn and print both side by side; exit 1 if their greedy texts differ"
    compare = add("compare", _compare, text, *PARTS)
    text = (
        "instead: judge both against the Hugging Face modules, with the logit gap at the first difference and the "
        "rounding beside it; exit 1 if a difference is no tie"
    )
    compare.add_argument("--ties", action="store_true", help=text)
    text = "draw sampled frames with the kept visual tokens lit and the target's attention as a heat map"
    inspect = add("inspect", _inspect, text, "video", "prune")
    inspect.add_argument("-o", "--output", metavar="FILE.png", type=_png, required=True, help="the picture to write")
    bench = commands.add_parser("bench", help="measure", description="Measurements, one a question.")
    questions = bench.add_subparsers(metavar="QUESTION", dest="question", required=True)
    _add_acceptance(questions)
    _add_speed(questions)
    return parser


def _add_acceptance(questions: Any) -> None:
    text = "rank the pruners: accepted draft tokens by pruner and keep_ratio, and whether every answer is identical"
    parser = questions.add_parser("acceptance", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=_bench_acceptance)
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    text = "folder with videos and clips.jsonl, a line {id, file, prompt} each [default: the bundled held-out clips]"
    parser.add_argument("--clips", metavar="DIR", help=text)
    parser.add_argument("--pruners", metavar="A,B", help="the pruners to rank [default: all]")
    parser.add_argument("--keep-ratios", metavar="X,Y", default="1,0.5,0.25,0.1,0.05", help="[default: %(default)s]")
    text = "drafted trees, all but the first at keep_ratio 1 and 0.1 alone [default: paper chain:5]"
    parser.add_argument("--trees", metavar="TREE", nargs="+", default=["paper", "chain:5"], help=text)
    parser.add_argument("--out", metavar="FILE.jsonl", help="write a line per clip and method, after one of provenance")
    parser.add_argument("--page", metavar="FILE.md", help="write the table there [default: stdout]")
    _add_model(parser, has_draft=True)
    _add_settings(parser, PARTS["video"])
    group = parser.add_argument_group("How long the answers are")
    _add_setting(group, next(part for part in fields(PARTS["sampling"]) if part.name == "max_new_tokens"), int)


def _add_speed(questions: Any) -> None:
    text = "time decoding, its single steps beside the memory-bandwidth floor, and other engines on the same models"
    parser = questions.add_parser("speed", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=_bench_speed)
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    text = "planted pairs, full-size models with random weights whose text is known [default: every family's]"
    parser.add_argument("--pairs", metavar="A,B", help=text)
    parser.add_argument("--tiny", action="store_true", help="shrink the planted models: a check, no measurement")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the planted weights [default: 0]")
    group = parser.add_argument_group("Real checkpoints instead of planted pairs")
    group.add_argument("--target", metavar="TARGET", help="Hugging Face directory or hub id")
    group.add_argument("--draft", metavar="DRAFT", help="the same for the draft")
    group = parser.add_argument_group("Real clips")
    text = "whole answers instead of single steps: DIR has videos and clips.jsonl, a line {id, file, prompt} each "
    text += "[default: the bundled held-out clips, and the bundled pair]"
    group.add_argument("--clips", metavar="DIR", nargs="?", const="", help=text)
    group = parser.add_argument_group("What is measured")
    group.add_argument("--visual-tokens", metavar="N,N", default="16384", help="[default: %(default)s]")
    group.add_argument("--keep-ratios", metavar="X,Y", default="0.1", help="[default: %(default)s]")
    help = "[default: all; of clips: plain,tree,auto]"
    group.add_argument("--methods", metavar="A,B", help=help)
    help = "drafted trees; the chain method takes the chains, the tree method the others [default: paper chain:5]"
    group.add_argument("--trees", metavar="TREE", nargs="+", help=help, default=argparse.SUPPRESS)
    help = "weight-only quantisations of the draft: none, fp8, int8, int4 [default: none]"
    group.add_argument("--draft-quants", metavar="A,B", help=help)
    help = "what the auto method's planted draft knows: published, hopeless, changing [default: published]"
    group.add_argument("--planted-drafts", metavar="A,B", help=help)
    help = "tokens of an answer [default: 256]"
    group.add_argument("--tokens", dest="num_tokens", type=int, metavar="N", help=help, default=argparse.SUPPRESS)
    help = "counted answers of each method [default: 5; of clips: 3]"
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


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="VIDEO", help="path or URL of a video, or - for a file on stdin")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question [default: a description]")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")


def _add_model(parser: argparse.ArgumentParser, *, has_draft: bool) -> None:
    """Add the arguments of `SpecVLM.from_pretrained`; their defaults stand there."""
    group = parser.add_argument_group("Models")

    def add(flag: str, help: str) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, help=help, metavar=flag.rpartition("-")[2].upper())

    add("--target", "Hugging Face directory or hub id of the model whose words come out [default: the bundled pair]")
    if has_draft:
        text = "the same for a smaller model of its family, or self (the target drafts for itself); without it a target"
        add("--draft", f"{text} decodes plainly")
    add("--device", "auto, cpu, cuda, cuda:1, ... [default: auto]")
    if has_draft:
        add("--draft-device", "the draft's [default: the target's]")
        add("--draft-quant", "weight-only quantisation of the draft: fp8, int8 or int4 [default: none]")
    add("--dtype", "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16 [default: auto]")


def _add_settings(parser: argparse.ArgumentParser, part: Any) -> None:
    group = parser.add_argument_group(part.__doc__.partition(".")[0])
    hints = get_type_hints(part)
    for setting in fields(part):
        _add_setting(group, setting, hints[setting.name])


def _add_setting(group: Any, setting: Field[Any], hint: Any) -> None:
    """Add the option of one config field. It sets nothing unless it is given: the default stays with the field."""
    help, choices = setting.metadata["help"], setting.metadata.get("choices")
    flag = f"--{setting.name.replace('_', '-')}"
    common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
    if hint is bool:
        action: Any = argparse.BooleanOptionalAction if setting.default else "store_true"
        group.add_argument(flag, action=action, help=help, **common)
        return
    if get_origin(hint) is tuple:
        group.add_argument(flag, action="append", metavar="TEXT", help=help, **common)
        return
    if setting.default not in (None, MISSING):
        shown = f"{setting.default:g}" if isinstance(setting.default, float) else setting.default
        help += f" [default: {shown}]"
    kind = kind_of(hint)
    metavar = None if isinstance(choices, tuple) else {int: "N", float: "X"}.get(kind, "NAME" if choices else "TEXT")
    known = choices if isinstance(choices, tuple) else None  # a registry's names are checked when torch is there
    group.add_argument(flag, type=kind, choices=known, metavar=metavar, help=help.replace("%", "%%"), **common)


def _png(path: str) -> str:
    """Return the path if a PNG may be written there."""
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{path!r} is not allowed: give a name that ends in .png")
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path!r} is a folder: give a file in it")
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{path!r}: there is no folder {folder!r}: create it first")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path!r}: {folder!r} is not writable: choose another folder")
    return path


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by their names in the configs.

    Raises:
        ConfigError: a value is not allowed.
    """
    names = [setting.name for part in PARTS.values() for setting in fields(part)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    EngineConfig().replace(**settings)
    return settings


# Commands


def _load(args: argparse.Namespace, status: Status) -> SpecVLM:
    """Load the models that the options name, and no draft where none is used."""
    options = {name: getattr(args, name) for name in MODEL_OPTIONS if hasattr(args, name)}
    is_plain = args.settings.get("drafter") == "none"
    if is_plain and "draft" in options:
        raise ConfigError(f"draft={options['draft']!r} is not allowed with --no-draft: leave one of them out")
    from specvlm.engine import SpecVLM, bundled

    if args.command == "inspect":
        options.setdefault("target", bundled("target"))
    return SpecVLM.from_pretrained(**options, **args.settings, watch=status.show)


def _source(args: argparse.Namespace) -> str | bytes:
    """Return VIDEO, or what stdin holds. A path that does not exist is found before the models are loaded.

    Raises:
        MediaError: it does not exist; stdin is a terminal or holds too much.
    """
    if args.source != "-":
        is_url = "://" in args.source or args.source.startswith("data:")
        if not (is_url or os.path.exists(args.source)):
            raise MediaError(f"{args.source!r} does not exist: check the path")
        return str(args.source)
    if sys.stdin.isatty():
        raise MediaError("stdin is a terminal: pipe a video file into it, or give a path")
    limit = EngineConfig().replace(**args.settings).video.max_download_bytes
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise MediaError(f"stdin holds more than {limit} bytes: raise --max-download-bytes or give a path")
    return data


def _print_json(content: object) -> None:
    print(json.dumps(content))


def _describe(args: argparse.Namespace, status: Status) -> int:
    source, model = _source(args), _load(args, status)
    from specvlm.explain import explain

    request = model.request(source, args.prompt)
    request.seconds.on_stage = status.stages()
    if args.json:
        generation = model.generate_request(request)
        _print_json(generation.to_dict())
    else:
        with _text_on_stdout(status) as write:
            generation = model.generate_request(request, write)
    status.clear()
    if args.explain:
        print(explain(generation.decisions), file=sys.stderr)
    if args.stats:
        print(_account(generation), file=sys.stderr)
    return 0


@contextmanager
def _text_on_stdout(status: Status) -> Iterator[Callable[[Chunk], None]]:
    """Yield a function that writes a chunk at once; end the text with a line break, also where it breaks off."""
    has_begun = False

    def write(chunk: Chunk) -> None:
        nonlocal has_begun
        has_begun = True
        status.close()
        print(chunk.text, end="", flush=True)

    try:
        yield write
    finally:
        if has_begun and not isinstance(sys.exc_info()[1], OSError):  # stdout may be what failed
            print(flush=True)


def _account(generation: Generation) -> str:
    """Return the account of a run for people."""
    from specvlm.compare import ms_a_token

    usage, speculation, seconds = generation.usage, generation.speculation, generation.seconds.to_dict()
    first, total = seconds.pop("time_to_first_token"), seconds.pop("total")
    depths = ", ".join(map(str, speculation.accepted_per_depth)) or "none"
    rows = {
        "prompt": f"{usage.prompt_tokens} tokens, {usage.visual_tokens} of them visual; "
        f"the draft saw {usage.kept_visual_tokens} of those",
        "answer": f"{usage.completion_tokens} tokens in {speculation.target_passes} target passes; "
        f"ended by {generation.finish_reason}",
        "drafts": f"{speculation.drafted_tokens} tokens in {speculation.rounds} rounds, "
        f"{speculation.accepted_tokens} accepted",
        "accepted": f"{speculation.mean_accepted_length:.2f} a round, {speculation.acceptance_length:.2f} with the "
        f"bonus token; rounds by depth: {depths}",
        "seconds": ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in seconds.items()),
        "": f"first token after {first:.3f}, the last after {total:.3f}; {ms_a_token(generation):.2f} ms a token",
        "memory": f"{generation.peak_memory_bytes / 2**20:.0f} MiB at most",
    }
    return "\n".join(f"{label:<10}{text}" for label, text in rows.items())


def _compare(args: argparse.Namespace, status: Status) -> int:
    source, model = _source(args), _load(args, status)
    if args.ties:
        return _ties(args, status, source, model)
    from specvlm.compare import compare

    comparison = compare(model, source, args.prompt, watch=status.stages)
    status.clear()
    if args.json:
        _print_json(comparison.to_dict())
    else:
        print(comparison.table())
    return 0 if comparison.is_identical else 1


def _ties(args: argparse.Namespace, status: Status, source: str | bytes, model: SpecVLM) -> int:
    from specvlm.ties import ties

    found = ties(model, source, args.prompt, watch=status.stages)
    status.clear()
    if args.json:
        _print_json(found.to_dict())
    else:
        print(found.table())
    return 0 if found.is_lossless else 1


def _bench_acceptance(args: argparse.Namespace, status: Status) -> int:
    try:
        ratios = [float(ratio) for ratio in args.keep_ratios.split(",")]
    except ValueError as error:
        raise ConfigError(f"keep_ratios={args.keep_ratios!r} is not allowed: write numbers such as 1,0.5") from error
    for ratio in ratios:
        EngineConfig().replace(keep_ratio=ratio)
    from specvlm import prune
    from specvlm.bench import acceptance
    from specvlm.engine import bundled

    directory = Path(args.clips or bundled("clips"))
    clips = acceptance.read_clips(directory)
    sweep = acceptance.methods(args.pruners.split(",") if args.pruners else list(prune.PRUNERS), ratios, args.trees)
    model = _load(args, status)
    for method in sweep:
        model.request(None, **dataclasses.asdict(method))  # refuses what is not allowed before any work

    def watched() -> Iterator[acceptance.Result]:
        for number, result in enumerate(acceptance.run(model, directory, clips, sweep), 1):
            status.show(f"{result.clip}: {number} of {len(clips) * len(sweep)} answers")
            yield result

    results = acceptance.record(watched(), args.out, args.page)
    return 0 if all(result.is_identical for result in results) else 1


def _bench_speed(args: argparse.Namespace, status: Status) -> int:
    if args.target and args.pairs:
        raise ConfigError(f"pairs={args.pairs!r} is not allowed beside --target: leave one of them out")
    if bool(args.target) != bool(args.draft):
        raise ConfigError("bench speed needs a target and a draft: give both --target and --draft, or neither")
    if args.clips is not None:
        return _bench_clips(args, status)
    from specvlm.bench import plots, summary

    if args.plots:
        plots.check()  # before anything is measured
    lines: list[summary.Line] = []
    try:
        lines.extend(summary.read(args.lines) if args.lines else _speed_lines(args, status))
    finally:  # what was measured is shown, also where the run was interrupted
        status.clear()
        if lines:
            print(summary.table(lines), end="")
    if args.plots:
        plots.draw(lines, args.plots)
    return 0 if all(line.get("error") is None and line.get("follows_plant") is not False for line in lines) else 1


def _speed_lines(args: argparse.Namespace, status: Status) -> Iterator[dict[str, Any]]:
    """Measure what the options say."""
    optional = ("num_tokens", "repeats", "slow_repeats", "trees")
    given: dict[str, Any] = {name: getattr(args, name) for name in optional if hasattr(args, name)}
    given |= {"trees": tuple(given["trees"])} if "trees" in given else {}
    for name in ("methods", "draft_quants", "planted_drafts"):
        given |= {name: tuple(getattr(args, name).split(","))} if getattr(args, name) else {}
    if args.target and args.planted_drafts:
        problem = f"planted_drafts={args.planted_drafts!r} is not allowed beside --target"
        raise ConfigError(f"{problem}: leave one of them out")
    given |= {"planted_drafts": ()} if args.target else {}
    counts, ratios = (_numbers(args, name, kind) for name, kind in (("visual_tokens", int), ("keep_ratios", float)))
    from specvlm.bench import published, runner, speed, subjects
    from specvlm.model import resolve_device, resolve_dtype

    sweep = speed.Sweep(counts, ratios, **given)
    if args.target:
        sources: list[subjects.Source] = [subjects.CheckpointSource(args.target, args.draft)]
    else:
        names = (args.pairs or published.DEFAULT_PAIRS).split(",")
        sources = [subjects.PlantedSource.of(name, is_tiny=args.tiny, seed=args.seed) for name in names]
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    records = runner.run(sources, sweep, device, dtype, watch=status.show, vllm_python=args.vllm_python)
    return runner.write(records, args.out)


_NOT_OF_CLIPS = {"pairs": None, "tiny": False, "seed": 0, "visual_tokens": "16384", "planted_drafts": None,
                 "slow_repeats": None, "vllm_python": sys.executable, "plots": None}  # fmt: skip


def _bench_clips(args: argparse.Namespace, status: Status) -> int:
    """Time whole answers on real clips."""
    for name, default in _NOT_OF_CLIPS.items():
        if getattr(args, name, default) != default:
            raise ConfigError(f"{name}={getattr(args, name)!r} is not allowed beside --clips: leave one of them out")
    from specvlm.bench import answers

    found, origin = answers.read(args.lines) if args.lines else _clip_answers(args, status)
    lines: list[dict[str, Any]] = []
    try:
        lines.extend(found)
    finally:  # what was measured is shown, also where the run was interrupted
        status.clear()
        if lines:
            print(answers.table(lines, origin), end="")
    return 0 if all(line["is_identical"] for line in lines) else 1


def _clip_answers(args: argparse.Namespace, status: Status) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    """Measure what the options say; return the lines, as they come, and their provenance."""
    several = {
        "trees": getattr(args, "trees", ["paper"]),
        "keep_ratios": _numbers(args, "keep_ratios", float),
        "draft_quants": (args.draft_quants or "none").split(","),
    }
    for name, values in several.items():
        if len(values) > 1:
            raise ConfigError(f"{name}={values!r} is not allowed beside --clips: name one")
    repeats = getattr(args, "repeats", 3)
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} is not allowed: at least 1")
    settings = {"tree": several["trees"][0], "keep_ratio": several["keep_ratios"][0]}
    settings |= {"max_new_tokens": args.num_tokens} if hasattr(args, "num_tokens") else {}
    from specvlm.bench import acceptance, answers
    from specvlm.bench.provenance import command_line, provenance
    from specvlm.engine import SpecVLM, bundled

    methods = answers.settings_of(args.methods.split(",") if args.methods else answers.DEFAULT_METHODS, **settings)
    directory = Path(args.clips or bundled("clips"))
    clips = acceptance.read_clips(directory)
    quant = None if several["draft_quants"] == ["none"] else several["draft_quants"][0]
    options = {"draft": args.draft, "device": args.device, "dtype": args.dtype, "draft_quant": quant}
    model = SpecVLM.from_pretrained(args.target, **options, watch=status.show)
    for name in methods:
        model.request(None, **methods[name])  # refuses what is not allowed before any work
    found = answers.run(model, directory, clips, methods, repeats=repeats, watch=status.show)
    origin = provenance(command_line()) | {name: model.models[name] for name in ("device", "dtype", "draft_quant")}
    return answers.write(found, origin, args.out), origin


def _numbers(args: argparse.Namespace, name: str, kind: type[Any]) -> tuple[Any, ...]:
    text = getattr(args, name)
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not allowed: write numbers, with commas between them") from error


def _inspect(args: argparse.Namespace, status: Status) -> int:
    source, model = _source(args), _load(args, status)
    from specvlm.inspect import inspect

    found = inspect(model, source, args.prompt, watch=status.stages())
    status.show("drawing...")
    found.save(args.output)
    status.clear()
    if args.json:
        _print_json({"output": args.output, **found.to_dict()})
    else:
        print(f"{args.output}: {found.summary()}")
    return 0
