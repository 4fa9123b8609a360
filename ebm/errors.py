"""What a user can be told, with the exit code each kind ends in (docs in README, "Exit codes")."""


class UserError(Exception):
    """A problem the user can mend. The message names the key or file, the value and the remedy."""

    exit_code = 1


class ConfigError(UserError):
    """Bad usage or configuration."""

    exit_code = 2


class DivergenceError(UserError):
    """Training diverged beyond recovery."""

    exit_code = 3


class LostPeerError(UserError):
    """Another rank of the job is gone."""


class DataError(UserError):
    """A shard, manifest, image or checkpoint that can't be used."""

    exit_code = 4


EXIT_STOPPED = 75  # stopped on request, resumable (EX_TEMPFAIL of sysexits.h)
