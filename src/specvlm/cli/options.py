"""Options of the commands: built from the fields of the configs, whose defaults stand there.

Nothing here imports torch or transformers before a model is loaded, so that help and bad options answer at once.
"""

from __future__ import annotations

import argparse
import hashlib
import runpy
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_origin, get_type_hints

from specvlm.cli import console, plugins
from specvlm.cli.progress import Status
from specvlm.core import checks
from specvlm.core.config import EngineConfig, kind_of
from specvlm.core.errors import ConfigError

if TYPE_CHECKING:
    from specvlm.engine.api import SpecVLM

PARTS: dict[str, Any] = get_type_hints(EngineConfig)  # "video" -> VideoConfig, ...
MODEL_OPTIONS = ("target", "draft", "device", "draft_device", "draft_quant", "dtype")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help, and let an error of writing be told: argparse swallows it."""
        print(message, end="", file=file or sys.stderr)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave the program, after `--help` or `--version`."""
        sys.stdout.flush()  # a closed stdout is found here, not while Python shuts down
        super().exit(status, message)


def add_model(parser: argparse.ArgumentParser, *, has_draft: bool) -> None:
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


def add_settings(parser: argparse.ArgumentParser, part: Any, *, but: Collection[str] = ()) -> None:
    """Add the options of a config's fields, but for some."""
    group = parser.add_argument_group(part.__doc__.partition(".")[0])
    hints = get_type_hints(part)
    for setting in fields(part):
        if setting.name not in but:
            add_setting(group, setting, hints[setting.name])


def add_setting(group: Any, setting: Field[Any], hint: Any) -> None:
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


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by their names in the configs.

    Raises:
        ConfigError: a value is not allowed.
    """
    names = [setting.name for part in PARTS.values() for setting in fields(part)]
    found = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    checks.settings(EngineConfig().replace(**settings), is_extended=bool(getattr(args, "load", ())))
    return settings


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused without torch, beside settings: models, devices, and files to be run.

    Raises:
        ConfigError: a value is not allowed, or a file cannot be read.
        UnsupportedModel: a checkpoint does not exist.
    """
    for name in ("target", "draft"):
        value = getattr(args, name, None)
        if value is not None and not (name == "draft" and value == "self"):
            checks.checkpoint(value)
    for name in ("device", "draft_device"):
        if hasattr(args, name):
            checks.device(getattr(args, name), name)
    if hasattr(args, "dtype"):
        checks.dtype(args.dtype)
    if hasattr(args, "draft_quant"):
        checks.quant(args.draft_quant)
    for file in getattr(args, "load", ()):
        _content(file)


def add_command(
    commands: Any, name: str, run: Callable[..., int], help: str, **options: Any
) -> argparse.ArgumentParser:
    """Add a command: what runs it, and its help, which describes it as well."""
    description = f"{help[0].upper()}{help[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description, **options)
    parser.set_defaults(run=run)
    return parser


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the files of the user's own to run first; see `run_files`."""
    text = "Python file that registers pruners, drafters or policies of your own; may be repeated"
    parser.add_argument("--load", metavar="FILE.py", action="append", default=[], help=text)


def run_files(files: Sequence[str]) -> dict[str, str]:
    """Run Python files for what they register; return their checksums.

    Raises:
        ConfigError: one cannot be read, or fails.
    """
    checksums = {}
    for file in files:
        checksums[file] = hashlib.sha256(_content(file)).hexdigest()
        try:
            runpy.run_path(file)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{file} failed ({type(error).__name__}: {error}): mend it") from error
    return checksums


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file} cannot be read ({problem}): check the path") from error


def load(args: argparse.Namespace, status: Status) -> SpecVLM:
    """Load the models that the options name, and no draft where none is used."""
    options = {name: getattr(args, name) for name in MODEL_OPTIONS if hasattr(args, name)}
    is_plain = args.settings.get("drafter") == "none"
    if is_plain and "draft" in options:
        raise ConfigError(f"draft={options['draft']!r} is not allowed with --no-draft: leave one of them out")
    check(args)
    from specvlm.engine.api import SpecVLM
    from specvlm.engine.pair import bundled

    console.raise_on_signals()
    run_files(args.load)
    if args.command == "inspect":
        options.setdefault("target", bundled("target"))
    model = SpecVLM.from_pretrained(**options, **args.settings, watch=status.show)
    for problem in model.without_effect(args.settings, is_drawn=args.command == "inspect"):
        status.warn(problem)
    return model


def numbers(args: argparse.Namespace, name: str, kind: type[Any]) -> tuple[Any, ...]:
    """Return the numbers of an option, written with commas between them.

    Raises:
        ConfigError: a part is no such number.
    """
    text = getattr(args, name)
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not allowed: write numbers, with commas between them") from error


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `read_data`."""
    group = parser.add_argument_group("Data")
    text = "bundled, videodetailcaption, mvbench, mlvu, longvideobench, video-mme, or a FILE.jsonl with a line "
    group.add_argument("--data", metavar="NAME", help=f"{text}{{video, prompt, id}} each [default: bundled]")
    text = "where a published set lies, its archives unpacked [default: fetched from the hub]"
    group.add_argument("--data-dir", metavar="DIR", help=text)
    text = "question: the set's own questions; describe: a detailed description of each video [default: question]"
    group.add_argument("--ask", choices=("question", "describe"), help=text)
    group.add_argument("--limit", metavar="N", type=int, help="no more samples than this, evenly spread over the data")


def read_data(args: argparse.Namespace, status: Status, **defaults: Any) -> Any:
    """Read the samples that the options name; each one that the data do not give is a warning.

    Raises:
        ConfigError: a name or value is not allowed, a file cannot be read or fetched, or no sample is left.
    """
    readers = plugins.load(plugins.DATA)
    if not readers:
        raise ConfigError("no package that reads data sets is installed: pip install 'specvlm[bench]', or name a VIDEO")
    status.show("reading the data...")
    ask = args.ask or defaults.get("ask", "question")
    found = readers[0](args.data or defaults.get("data"), args.data_dir, ask=ask, limit=args.limit)
    for problem in found.problems:
        status.warn(f"{problem.where}: {problem.text}")
    return found
