"""ebm COMMAND: training, and what goes on around it."""

import argparse
import importlib
import signal
import sys
from typing import Any

from ebm import __version__

COMMANDS = {
    "train": "train an energy, or resume a run",
    "doctor": "what this machine has, and how a run fares: what is odd, what to do next",
    "shard": "write images to webdataset shards with a manifest",
    "index": "make a manifest for shards written elsewhere, or verify one",
    "init": "write a config that fits your images, with a time estimate",
    "sample": "draw fresh chains with a run's averaged weights",
    "score": "energies of images",
    "evaluate": "Fréchet distance, out-of-distribution AUROC and more",
    "report": "RUN/report.html: curves, samples, energies, health on one page",
    "dashboard": "a W&B workspace and report for a project of runs",
    "sync": "upload to W&B what runs logged offline",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. What it needs is imported inside: Ctrl-C ends that quietly, too."""
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = 130
    from ebm.errors import EXIT_STOPPED

    # It was asked to end: one more Ctrl-C ends it at once, without an exit's tracebacks.
    if code in (EXIT_STOPPED, 130):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def run(arguments: list[str]) -> int:
    from ebm.errors import UserError
    from ebm.runtime.process import configure_logging, flush_output, prepare_process, show_error

    prepare_process()
    try:
        options = parse(arguments)
        configure_logging()
        code: int = importlib.import_module(f"ebm.commands.{options.command}").run(options)
        return code
    except UserError as error:
        show_error(error)
        return error.exit_code
    except BrokenPipeError:
        if arguments[0] == "train" and not {"--dry-run", "--help", "-h"} & {*arguments}:
            # Its own output can't end it: this is another pipe.
            raise
        return 128 + signal.SIGPIPE  # whoever read the output, such as `head`, has seen enough
    finally:
        flush_output()


class Completion(argparse.Action):
    """`--print-completion SHELL`: prints a script that completes commands, options and keys there, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        from ebm.config import describe
        from ebm.errors import ConfigError

        try:
            import shtab
        except ImportError as error:
            raise ConfigError("--print-completion needs the package shtab: pip install shtab") from error
        parser, _ = parser_of([], tuple(COMMANDS))
        commands = next(action for action in parser._actions if action.dest == "command")
        assert isinstance(commands.choices, dict)
        for sub in commands.choices.values():
            for action in sub._actions:
                if action.dest == "overrides":
                    action.choices = sorted({f"{row.key}=" for row in describe()})
                elif action.nargs != 0 and action.choices is None:  # a run, a file or a folder; a number is typed
                    setattr(action, "complete", shtab.FILE)  # noqa: B010 - shtab's own attribute
        print(shtab.complete(parser, shell=values))
        parser.exit()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command and its options. Only the module of the command itself is imported, since it loads torch."""
    parser, arguments = parser_of(arguments, tuple(arguments[:1]))
    return parser.parse_args(arguments)


def parser_of(arguments: list[str], loaded: tuple[str, ...]) -> tuple[argparse.ArgumentParser, list[str]]:
    """A parser that knows the options of the commands `loaded`, and the arguments in the form that it reads."""
    parser = argparse.ArgumentParser(prog="ebm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ebm {__version__}")
    parser.add_argument(
        "--print-completion", choices=("bash", "zsh", "tcsh"), action=Completion,
        help="a script that completes what you type: eval \"$(ebm --print-completion bash)\"",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=meaning,
            description=meaning,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name != "train",  # which has a help of its own
        )
        if name in loaded:
            module = importlib.import_module(f"ebm.commands.{name}")
            module.add_arguments(sub)
            if name == "train" and arguments:
                arguments = ["train", *module.arrange(sub, arguments[1:])]
    return parser, arguments


if __name__ == "__main__":
    sys.exit(main())
