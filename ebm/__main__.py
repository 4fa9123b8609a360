"""ebm COMMAND: training, and what goes on around it."""

import argparse
import importlib
import signal
import sys

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
    "sync": "upload to W&B what runs logged offline",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. What it needs is imported inside: Ctrl-C ends that quietly, too."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more ends the process at once, without an exit's tracebacks
        return 130


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


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command and its options. Only the module of the command itself is imported, since it loads torch."""
    parser = argparse.ArgumentParser(prog="ebm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ebm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=meaning,
            description=meaning,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name != "train",  # which has a help of its own
        )
        if name in arguments[:1]:
            module = importlib.import_module(f"ebm.commands.{name}")
            module.add_arguments(sub)
            if name == "train":
                arguments = ["train", *module.arrange(sub, arguments[1:])]
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
