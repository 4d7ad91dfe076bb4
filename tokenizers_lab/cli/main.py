"""The command `toklab`. Only argparse is imported until a command runs."""

import argparse
import difflib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from tokenizers_lab.errors import TokenizersLabError

COMMANDS = (
    "train", "encode", "decode", "reconstruct", "eval", "probe", "compare", "app", "report", "latent-stats", "latents",
    "generate", "features", "tokenize", "export", "convert", "info", "config", "list", "assets")
MODULES = {"tokenize": "tokenize_data"}      # commands whose module must not be called like one of the standard library's
USER_ERROR = 2
DESCRIPTION = "Train, use and compare tokenizers for images and speech."
EPILOG = "toklab COMMAND --help explains a command. Errors are one line; TOKLAB_DEBUG=1 shows where they came from."


class Parser(argparse.ArgumentParser):
    """Errors name the nearest known word and end with the exit status of every user error."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.words: dict[str, Parser] = {}      # first words of the command that have a parser of their own

    def parse_known_args(self, args=None, namespace=None):      # type: ignore[no-untyped-def]
        """As argparse's, but a first word that has a parser of its own is left to it."""
        if args and args[0] in self.words:
            return self.words[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line on stderr."""
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_module(name: str) -> ModuleType:
    """The module of a command: `help`, `add_arguments(parser)`, `run(args)`, and perhaps `description`, `example`, and `WORDS`:
    first words that another module NAME_WORD takes, such as `toklab eval gfid`."""
    return importlib.import_module(f"tokenizers_lab.cli.{MODULES.get(name, name.replace('-', '_'))}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="toklab", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND [option …]", title="commands")
    for name in COMMANDS:
        module = command_module(name)
        sub: Parser = commands.add_parser(name, help=module.help, **texts(name, module))
        for word in getattr(module, "WORDS", ()):
            sub.words[word] = Parser(prog=f"{sub.prog} {word}", **texts(f"{name} {word}", command_module(f"{name}-{word}")))
            fill(sub.words[word], command_module(f"{name}-{word}"))
        fill(sub, module)
    return parser


def texts(name: str, module: ModuleType) -> dict[str, Any]:
    """What a command's help says before and behind its options."""
    description = getattr(module, "description", module.help[0].upper() + module.help[1:] + ".")
    return {"description": description, "epilog": f"example: {getattr(module, 'example', f'toklab {name}')}",
            "formatter_class": argparse.RawDescriptionHelpFormatter}


def fill(parser: Parser, module: ModuleType) -> None:
    """A command's arguments, and what runs it."""
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def check_command(argv: Sequence[str]) -> str | None:
    """The message for a first word that is no command, None if it is one."""
    word = next((a for a in argv if not a.startswith("-")), None)
    if word is None or word in COMMANDS:
        return None
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"toklab: there is no command '{word}'; " + (f"nearest: '{near[0]}'" if near else f"commands: {', '.join(COMMANDS)}")


def call(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit status: 0, 1 for a failed check, 2 for a user's error, 128 + n for signal n."""
    unknown = check_command(argv)
    if unknown:
        print(unknown, file=sys.stderr)
        return USER_ERROR
    parser = build_parser()
    try:
        args, left = parser.parse_known_args(argv)
        if left and (not hasattr(args, "overrides") or any(word.startswith("-") for word in left)):
            parser.error(f"{args.command} does not know {' '.join(left)}")
        if left:      # argparse gives up on key=value words that come after an option
            args.overrides = [*args.overrides, *left]
    except SystemExit as ended:
        return int(ended.code or 0)
    if args.version:
        from tokenizers_lab import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return USER_ERROR
    warnings.showwarning = show_warning
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:      # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (TokenizersLabError, OSError) as error:
        if os.environ.get("TOKLAB_DEBUG"):
            raise
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file=None, line=None) -> None:
    """A warning as one line, without the source code around it."""
    if category is UserWarning:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `toklab` with the arguments (by default those of the process) and exit with its status."""
    sys.exit(call(sys.argv[1:] if argv is None else argv))
