"""Errors that a user can mend. Each kind ends a command with its own exit code (docs/clusters.md, "Exit codes")."""


def printable(text: str) -> str:
    """`text` with control characters escaped, newlines and tabs aside: names of files and answers of servers are
    others' texts, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A problem that the user can mend. The message names the key or file, the value and the remedy."""

    exit_code = 1


class ConfigError(UserError):
    """A command or a config is wrong."""

    exit_code = 2


class DivergenceError(UserError):
    """Training diverged beyond recovery."""

    exit_code = 3


class LostPeerError(UserError):
    """Another rank of the job has ended."""


class DataError(UserError):
    """A shard, manifest, image or checkpoint can't be used."""

    exit_code = 4


EXIT_STOPPED = 75  # the run stopped on request and can be resumed (EX_TEMPFAIL of sysexits.h)
