"""The commands of `python -m ebm`: a file each, with `add_arguments(parser)` and `run(arguments) -> exit code`."""
