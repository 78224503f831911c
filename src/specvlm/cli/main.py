"""The command line: `specvlm describe`, `compare`, `inspect`, `verify`, `bench` and `report`.

The answer goes to stdout, all else to stderr. Options are the fields of the configs. Torch and transformers are
imported when a command runs, so that help and bad options answer at once. An error is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from specvlm.cli import console, plugins
from specvlm.cli.interrupts import INTERRUPTED
from specvlm.cli.options import (
    PARTS,
    Parser,
    add_command,
    add_data,
    add_load,
    add_model,
    add_settings,
    check,
    given,
    load,
    read_data,
)
from specvlm.cli.progress import Status, quiet_libraries
from specvlm.core.config import EngineConfig
from specvlm.core.errors import Advice, CapacityError, ConfigError, MediaError, SpecVLMError, memory_errors, one_line
from specvlm.engine import sources

if TYPE_CHECKING:
    from specvlm.engine.account import Generation
    from specvlm.engine.api import SpecVLM
    from specvlm.engine.request import Request
    from specvlm.engine.text import Chunk


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    0, 1 (a difference was found), 2 (an error), 130 (interrupted), or 128 and the number of the signal that ended it.
    """
    try:
        console.prepare_streams()
        args = _parse(argv)
        status = Status(is_quiet=args.quiet)
        with quiet_libraries(status), memory_errors(), status:
            status.show("loading the libraries...")
            code: int = args.run(args, status)
            sys.stdout.flush()
        return code
    except SpecVLMError as error:
        return _fail(error.on_command_line() if isinstance(error, Advice) else str(error))
    except OSError as error:
        return _fail(console.not_written(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except console.Terminated as error:
        return error.status
    finally:
        console.restore_signals()


def _fail(message: str, code: int = 2) -> int:
    console.say(message)
    return code


# Options


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    while unknown and hasattr(args, "words") and not unknown[0].startswith("-"):
        args.words.append(unknown.pop(0))  # words behind an option that followed others
    if unknown[:1] == ["--"] and hasattr(args, "words"):
        args.words += unknown[1:]
        unknown = []
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
        videos = "VIDEO -o FILE.png" if name == "inspect" else "VIDEO [VIDEO ...]"
        usage = f"specvlm {name} [options] {videos} [PROMPT | -p PROMPT]"
        command = add_command(commands, name, run, help, usage=usage)
        _add_source(command)
        add_model(command, has_draft="draft" in parts)
        add_load(command)
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
    for add_commands in plugins.load(plugins.COMMANDS):
        add_commands(commands)
    return parser


def _add_verify(commands: Any) -> None:
    text = "prove on this machine that speculative = plain decoding = transformers' generate(); exit 1 if it is not so"
    text += ", 2 if a video could not be read"
    usage = "specvlm verify [options] [VIDEO ...]"
    parser = add_command(commands, "verify", _verify, text, usage=usage)
    parser.add_argument("words", metavar="VIDEO", nargs="*", help="videos [default: the bundled held-out clips]")
    text = "the question about each VIDEO [default: a description]"
    parser.add_argument("-p", "--prompt", metavar="TEXT", help=text)
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    add_model(parser, has_draft=True)
    add_load(parser)
    for part in PARTS.values():
        add_settings(parser, part)


def _add_source(parser: argparse.ArgumentParser) -> None:
    text = (
        "paths or URLs of videos, or - for a file on stdin; several stand in one prompt. A last word that is no video "
    )
    text += "is the question"
    parser.add_argument("words", metavar="VIDEO", nargs="+", help=text)
    parser.add_argument("-p", "--prompt", metavar="PROMPT", help="the question [default: a description]")
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


def _asked(args: argparse.Namespace) -> tuple[str | bytes | list[str | bytes], str | None]:
    """Return what stands for the videos, and the question. What does not exist is found before the models are loaded.

    Raises:
        ConfigError: a word may be a video or the question.
        MediaError: a video does not exist; stdin is closed, a terminal or holds too much.
    """
    words, prompt = list(args.words), args.prompt
    if prompt is None and len(words) > 1 and not sources.looks_like_media(words[-1]):
        if os.path.exists(words[-1]):
            problem = f"{words[-1]!r} may be a video, since it exists, or the question"
            raise ConfigError(f"{problem}: give the question with -p")
        prompt = words.pop()
    if missing := [word for word in words if not (sources.looks_like_media(word) or os.path.exists(word))]:
        if len(words) == 1 and args.prompt is None and prompt is None:
            raise MediaError(f"{words[0]!r} does not exist: check the path")
        problem = f"{missing[0]!r} is no video that exists, nor the question, which {(prompt or words[-1])!r} would be"
        raise MediaError(f"{problem}: check the path, and quote the question or give it with -p; see specvlm "
                         f"{args.command} --help")  # fmt: skip
    _refuse_missing(words)
    if words.count("-") > 1:
        raise ConfigError("'-' is stdin, which holds one file: give it once")
    found = [_stdin(args) if word == "-" else word for word in words]
    return found if len(found) > 1 else found[0], prompt


def _refuse_missing(words: Sequence[str]) -> None:
    if gone := [word for word in words if not (word == "-" or _is_url(word) or os.path.exists(word))]:
        raise MediaError(f"{gone[0]!r} does not exist: check the path")


def _is_url(word: str) -> bool:
    return "://" in word or word.startswith("data:")


def _stdin(args: argparse.Namespace) -> bytes:
    """Return what stdin holds."""
    if sys.stdin is None:
        raise MediaError("stdin is closed: pipe a video file into it, or give a path")
    if sys.stdin.isatty():
        raise MediaError("stdin is a terminal: pipe a video file into it, or give a path")
    limit = EngineConfig().replace(**args.settings).video.max_download_bytes
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise MediaError(f"stdin holds more than {limit} bytes: raise --max-download-bytes or give a path")
    return data


def _print_json(content: object) -> None:
    print(json.dumps(content, allow_nan=False))


def _describe(args: argparse.Namespace, status: Status) -> int:
    (source, prompt), model = _asked(args), load(args, status)
    from specvlm.engine.explain import explain

    request = model.request(source, prompt)
    request.seconds.on_stage = status.stages()
    if args.json:
        generation = model.generate_request(request)
        _print_json(generation.to_dict(has_decisions=args.explain))
    else:
        with _text_on_stdout(status) as write:
            generation = model.generate_request(request, write)
    status.clear()
    if args.explain and not args.json:
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
    from specvlm.check.compare import ms_a_token

    usage, speculation, seconds = generation.usage, generation.speculation, generation.seconds.to_dict()
    first, total = seconds.pop("time_to_first_token"), seconds.pop("total")
    depths = ", ".join(map(str, speculation.accepted_per_depth)) or "none"
    is_seen = speculation.rounds > 0 or usage.kept_visual_tokens > 0
    seen = f"the draft saw {usage.kept_visual_tokens} of those" if is_seen else "nothing was drafted"
    rows = {
        "prompt": f"{usage.prompt_tokens} tokens, {usage.visual_tokens} of them visual; {seen}",
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
    (source, prompt), model = _asked(args), load(args, status)
    if args.ties:
        return _ties(args, status, model.load(source, prompt), model)
    from specvlm.check.compare import compare

    comparison = compare(model, source, prompt, watch=status.stages)
    status.clear()
    if args.json:
        _print_json(comparison.to_dict())
    else:
        print(comparison.table())
    return 0 if comparison.is_identical else 1


def _ties(args: argparse.Namespace, status: Status, question: Request, model: SpecVLM) -> int:
    from specvlm.check.ties import ties

    found = ties(model, question, watch=status.stages)
    status.clear()
    if args.json:
        _print_json(found.to_dict())
    else:
        print(found.table())
    return 0 if found.is_lossless else 1


def _verify(args: argparse.Namespace, status: Status) -> int:
    if args.words:
        for name in ("data", "data_dir", "ask", "limit"):
            if getattr(args, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(args, name)!r} is not allowed beside a VIDEO: leave one of them out"
                )
        _refuse_missing(args.words)
        samples: list[tuple[str, Any, str | None, Any]] = [(name, name, args.prompt, {}) for name in args.words]
    else:
        if args.prompt is not None:
            raise ConfigError(f"prompt={args.prompt!r} is not allowed without a VIDEO: name one")
        check(args)  # the bundled clips are read with torch
        found = read_data(args, status).samples
        samples = [(sample.id, sample.video, sample.prompt, sample.settings) for sample in found]
    model, proofs = load(args, status), []
    from specvlm.check import lossless

    for name, source, prompt, settings in samples:
        try:
            with memory_errors():
                proof = lossless.verify(model, source, prompt, name=name, watch=status.stages, **settings)
        except (MediaError, CapacityError) as error:  # the others are proved all the same
            told = error.on_command_line() if isinstance(error, Advice) else one_line(error)
            proof = lossless.Proof(name, 0, (), told)
        proofs.append(proof)
        status.clear()
        if not args.json:
            print(proofs[-1].text(), flush=True)
    failed = sum(proof.failure is not None for proof in proofs)
    differ = sum(proof.failure is None and not proof.is_lossless for proof in proofs)
    dtype, verdict = model.models["dtype"], "NO" if differ else "yes" if failed < len(proofs) else "unknown"
    if args.json:
        counts = {"lossless": {"NO": False, "yes": True}.get(verdict), "not_answered": failed}
        _print_json({**counts, "dtype": dtype, "proofs": [proof.to_dict() for proof in proofs]})
    else:
        told = f", {failed} not answered" if failed else ""
        print(f"lossless ({dtype}): {verdict}, {len(proofs) - failed} of {len(proofs)} questions{told}")
    return 1 if differ else 2 if failed else 0


def _inspect(args: argparse.Namespace, status: Status) -> int:
    source, prompt = _asked(args)
    if isinstance(source, list):
        raise ConfigError(f"{len(source)} videos cannot be drawn at once: give one, and the question with -p")
    model = load(args, status)
    from specvlm.check.inspect import inspect

    found = inspect(model, source, prompt, watch=status.stages())
    status.show("drawing...")
    found.save(args.output)
    status.clear()
    if args.json:
        _print_json({"output": args.output, **found.to_dict()})
    else:
        print(f"{args.output}: {found.summary()}")
    return 0
