"""The `switchkd` command: a table of subcommands, each imported from its room only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO, cast

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # what a shell reports for a program ended by SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # whoever meets them while writing, it is for people to mend


@dataclass(frozen=True)
class Command:
    """A row of the front door: what a person types, the module that answers, and the extras it needs."""

    name: str
    module: str
    help: str
    group: str
    extras: str


COMMANDS = (
    Command(
        "quickstart",
        "switchkd.cli.quickstart",
        "the whole product in minutes: train, distil, export, measure (no network, no GPU)",
        "start here",
        "train,export,serve",
    ),
    Command(
        "world",
        "switchkd.training.world_command",
        "make the built-in picture world: pictures and LLaVA-format questions",
        "train",
        "train",
    ),
    Command(
        "data",
        "switchkd.training.data_command",
        "check a training set before a GPU is paid for, convert other ones, download",
        "train",
        "train",
    ),
    Command(
        "train",
        "switchkd.training.train_command",
        "train or distil a model from a recipe into a Hugging Face checkpoint folder",
        "train",
        "train",
    ),
    Command(
        "estimate",
        "switchkd.training.estimate_command",
        "say what a recipe takes before it is run: parameters, memory by part, tokens, hours",
        "train",
        "train",
    ),
    Command(
        "import",
        "switchkd.training.import_command",
        "turn a checkpoint of TinyLLaVA Factory or LLaVA's own into the standard folder",
        "train",
        "train",
    ),
    Command(
        "ablate",
        "switchkd.training.ablate_command",
        "run an ablation: every arm of a matrix, shared stages once, and the table",
        "train",
        "train",
    ),
    Command(
        "push",
        "switchkd.cli.push",
        "look a model folder or bundle over and upload it to the Hugging Face hub",
        "train",
        "train",
    ),
    Command(
        "export",
        "switchkd.export.export_command",
        "turn a checkpoint folder into a bundle of ONNX graphs, each one run and compared",
        "export",
        "export",
    ),
    Command(
        "verify",
        "switchkd.export.verify_command",
        "run a bundle's graphs and compare every precision with fp32, or with a checkpoint",
        "export",
        "export",
    ),
    Command(
        "eval",
        "switchkd.cli.eval_command",
        "score a checkpoint, a bundle or a server, with intervals, and compare two",
        "measure",
        "train,serve",
    ),
    Command(
        "ask",
        "switchkd.serve.ask_command",
        "ask a bundle about a picture; needs no torch",
        "use",
        "serve",
    ),
    Command(
        "serve",
        "switchkd.serve.serve_command",
        "answer over HTTP as OpenAI's chat completions do, on this machine or with a key",
        "use",
        "serve",
    ),
    Command(
        "bench",
        "switchkd.serve.bench_command",
        "measure what a bundle's answers take on this machine, stage by stage",
        "use",
        "serve",
    ),
    Command(
        "demo",
        "switchkd.demo.demo_command",
        "open a bundle as a web app on this machine",
        "use",
        "demo",
    ),
)


class CommandModule(Protocol):
    """What a command's module offers; `ERRORS` are the exceptions whose message is meant for people."""

    ERRORS: tuple[type[Exception], ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes cost the reader one line instead of a page of usage."""

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse a command's words; `train RECIPE --dry-run seed=1` may have its key=value behind its options."""
        args, rest = self.parse_known_args(words)
        # argparse fills a list of words only from those in front of the first option.
        if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in args):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            args.overrides = [*args.overrides, *rest]
        return args

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse's own takes no notice where it cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where to read on, and exit with code 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run one command line and return its exit code: 0 done, 2 a mistake named in one line, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed: print() would take stdout in its place
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as we live
    if sys.stdout is None:
        return fail("standard output is closed; send it to /dev/null where nothing is to be shown")
    tolerate_narrow_encodings()
    try:
        try:
            code = dispatch(words, commands)
        finally:  # a help page ends the process from within
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nswitchkd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not stdout_is_closed():
            raise
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in FULL:
            raise
        silence(sys.stdout)
        return fail(f"nothing more can be written ({error.strerror}): make room on the disk or where the output goes")
    return code


def dispatch(words: list[str], commands: Sequence[Command]) -> int:
    """Answer the words of one command line: our own options, or the command they name."""
    if words and words[0] == "help":  # `switchkd help ask` reads as `switchkd ask --help`
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(help_text(commands))
        return EXIT_OK
    if words[0] in ("-V", "--version"):
        print(f"switchkd {installed_version()}")
        return EXIT_OK
    for command in commands:
        if command.name == words[0]:
            return run_command(command, words[1:])
    return fail(unknown_word(words[0], commands))


def run_command(command: Command, words: list[str]) -> int:
    """Import the command's module, parse its arguments and run it; errors meant for people become one line."""
    people_errors: tuple[type[Exception], ...] = ()
    try:
        module = cast(CommandModule, importlib.import_module(command.module))
        people_errors = module.ERRORS
        parser = CommandParser(prog=f"switchkd {command.name}", description=sentence(command.help))
        module.add_arguments(parser)
        return module.run(parser.parse(words))
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            raise
        return fail(
            f"'switchkd {command.name}' needs the package '{package}', which is not installed; "
            f"install its extra: pip install 'switchkd[{command.extras}]'"
        )
    except people_errors as error:
        return fail(str(error) or type(error).__name__)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Name the third-party package whose absence raised this, or None when the failed import is a bug of ours."""
    package = (error.name or "").partition(".")[0]
    if not package or package == "switchkd" or package in sys.stdlib_module_names:
        return None
    # Installed, so only a module inside it is missing: no extra would mend that.
    return None if importlib.util.find_spec(package) else package


def fail(message: str) -> int:
    """Print an error in one line on stderr and return the exit code for it."""
    try:
        print(f"switchkd: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)  # full as well: the code has to do
    return EXIT_USAGE


def unknown_word(word: str, commands: Sequence[Command]) -> str:
    """Say that a word is no command of ours, and which one may have been meant."""
    import difflib

    kind = "option" if word.startswith("-") else "command"
    known = ["--help", "--version"] if kind == "option" else [command.name for command in commands]
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ";"
    return f"there is no {kind} '{word}'{hint} 'switchkd --help' lists what there is"


def help_text(commands: Sequence[Command]) -> str:
    """Return the front page: every command under its group, in the order of the pipeline."""
    width = max(len(command.name) for command in commands)
    lines = [
        "usage: switchkd COMMAND [OPTIONS]",
        "",
        "Distil a large vision-language model into a small one, export it, and run it anywhere.",
    ]
    for group in dict.fromkeys(command.group for command in commands):
        lines += ["", f"{group}:"]
        lines += [f"  {command.name:<{width}}  {command.help}" for command in commands if command.group == group]
    lines += [
        "",
        "options:",
        f"  {'--help':<{width}}  show this page; 'switchkd COMMAND --help' shows a command's own",
        f"  {'--version':<{width}}  show the installed version",
        "",
        "Each room installs apart, e.g. on a small board: pip install 'switchkd[serve]'",
        "(extras: train, export, serve, demo, eval, dev).",
    ]
    return "\n".join(lines)


def installed_version() -> str:
    """Return the version of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("switchkd")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def sentence(text: str) -> str:
    """Write a line of the table as a sentence, for the top of a command's help."""
    return f"{text[0].upper()}{text[1:]}."


def tolerate_narrow_encodings() -> None:
    """Let a terminal that cannot show a character show its number, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def stdout_is_closed() -> bool:
    """Tell whether the reader of our stdout has gone (`switchkd ... | head`), and silence the flush at exit if so."""
    if hasattr(select, "poll"):  # Windows has none; there a broken pipe is taken to be stdout
        poll = select.poll()
        poll.register(sys.stdout, 0)  # errors are reported without being asked for
        if not poll.poll(0):
            return False
    silence(sys.stdout)
    return True


def silence(stream: TextIO) -> None:
    """Let everything that this process still writes there go nowhere: Python flushes it at exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
