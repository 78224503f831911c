"""The command line: `specvlm describe`, `compare`, `inspect`, `verify`, `bench` and `report`.

The answer goes to stdout, all else to stderr. Options are the fields of the configs. Torch and transformers are
imported when a command runs, so that help and bad options answer at once. An error is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specvlm.bench import commands as bench_commands
from specvlm.config import EngineConfig
from specvlm.errors import CapacityError, ConfigError, MediaError, SpecVLMError, memory_errors, one_line
from specvlm.options import PARTS, Parser, add_data, add_model, add_settings, given, load, read_data
from specvlm.status import Status, no_litter, quiet_libraries

if TYPE_CHECKING:
    from specvlm.account import Generation
    from specvlm.engine import SpecVLM
    from specvlm.text import Chunk

NOT_WRITTEN = {
    errno.EPIPE: "stdout was closed before all was written: read it to its end",
    errno.ENOSPC: "no space left on the device: free some, or write elsewhere",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 (a difference was found), 2 (an error) or 130 (interrupted)."""
    try:
        args = _parse(argv)
        status = Status(is_quiet=args.quiet)
        with no_litter(), quiet_libraries(status), memory_errors(), status:
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


# Options


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        command = " ".join(filter(None, (args.command, getattr(args, "question", None))))
        raise ConfigError(f"unknown argument {unknown[0]!r}; see specvlm {command} --help")
    args.settings = given(args)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="specvlm", description="Lossless speculative decoding for video language models.")
    parser.add_argument("--version", action="version", version=f"specvlm {version('specvlm')}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    def add(name: str, run: Callable[..., int], help: str, *parts: str) -> argparse.ArgumentParser:
        usage = f"specvlm {name} [options] VIDEO [PROMPT]{' -o FILE.png' if name == 'inspect' else ''}"
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", usage=usage)
        command.set_defaults(run=run)
        _add_source(command)
        add_model(command, has_draft="draft" in parts)
        for part in parts:
            add_settings(command, PARTS[part])
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
    _add_verify(commands)
    bench = commands.add_parser("bench", help="measure", description="Measurements, one a question.")
    bench_commands.add(bench.add_subparsers(metavar="QUESTION", dest="question", required=True))
    _add_report(commands)
    return parser


def _add_verify(commands: Any) -> None:
    text = "prove on this machine that speculative = plain decoding = transformers' generate(); exit 1 if it is not so"
    usage = "specvlm verify [options] [VIDEO ...]"
    parser = commands.add_parser("verify", help=text, description=f"{text[0].upper()}{text[1:]}.", usage=usage)
    parser.set_defaults(run=_verify)
    parser.add_argument("sources", metavar="VIDEO", nargs="*", help="videos [default: the bundled held-out clips]")
    parser.add_argument("--prompt", metavar="TEXT", help="the question about each VIDEO [default: a description]")
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    add_model(parser, has_draft=True)
    for part in PARTS.values():
        add_settings(parser, part)


def _add_report(commands: Any) -> None:
    text = "tables, plots and a page of runs of bench quality; two or more are compared with the first"
    parser = commands.add_parser("report", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=_report)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="the --out of bench quality")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where they go [default: the first DIR]")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="VIDEO", help="path or URL of a video, or - for a file on stdin")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question [default: a description]")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")


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


# Commands


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
    source, model = _source(args), load(args, status)
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
    source, model = _source(args), load(args, status)
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


def _verify(args: argparse.Namespace, status: Status) -> int:
    from specvlm import lossless

    if args.sources:
        for name in ("data", "data_dir", "ask", "limit"):
            if getattr(args, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(args, name)!r} is not allowed beside a VIDEO: leave one of them out"
                )
        samples: list[tuple[str, Any, str | None, Any]] = [(name, name, args.prompt, {}) for name in args.sources]
    else:
        if args.prompt is not None:
            raise ConfigError(f"prompt={args.prompt!r} is not allowed without a VIDEO: name one")
        found = read_data(args, status).samples
        samples = [(sample.id, sample.video, sample.prompt, sample.settings) for sample in found]
    model, proofs = load(args, status), []
    for name, source, prompt, settings in samples:
        try:
            with memory_errors():
                proof = lossless.verify(model, source, prompt, name=name, watch=status.stages, **settings)
        except (MediaError, CapacityError) as error:  # the others are proved all the same
            proof = lossless.Proof(name, 0, (), one_line(error))
        proofs.append(proof)
        status.clear()
        if not args.json:
            print(proofs[-1].text(), flush=True)
    is_lossless = all(proof.is_lossless for proof in proofs)
    if args.json:
        _print_json({"lossless": is_lossless, "dtype": model.models["dtype"], "proofs": [p.to_dict() for p in proofs]})
    else:
        failed = sum(proof.failure is not None for proof in proofs)
        told = f", {failed} not answered" if failed else ""
        print(f"lossless ({model.models['dtype']}): {'yes' if is_lossless else 'NO'}, {len(proofs)} questions{told}")
    return 0 if is_lossless else 1


def _report(args: argparse.Namespace, status: Status) -> int:
    from specvlm.bench import report

    found = report.build(args.directories, args.output or args.directories[0])
    status.clear()
    print(found.markdown, end="")
    return 0


def _inspect(args: argparse.Namespace, status: Status) -> int:
    source, model = _source(args), load(args, status)
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
