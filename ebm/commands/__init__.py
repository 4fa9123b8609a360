"""The commands of `python -m ebm`: a file each, with `add_arguments(parser)` and `run(arguments) -> exit code`."""

import argparse


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of every command that computes with a run."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option of every command that can take a run's last weights in place of the averaged ones."""
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default), or the last ones")
