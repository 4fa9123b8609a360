"""What all sections of the config share."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A section of the config. It is frozen, and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def kind_by_default(kind: str) -> BeforeValidator:
    """For a union of sections: values without a `kind` are read as those of `kind`."""

    def complete(values: Any) -> Any:
        return {"kind": kind, **values} if isinstance(values, dict) and "kind" not in values else values

    return BeforeValidator(complete)


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home directory, also after the kind of a source, as in
    folder:~/pictures. Raises ValueError where there is none."""
    kind, colon, rest = path.partition(":")
    if colon and rest.startswith("~"):
        return f"{kind}:{expand_home(rest)}"
    expanded = os.path.expanduser(path)  # pathlib would change `a//b` and URLs
    if expanded.startswith("~"):
        raise ValueError(f"there is no home directory {path.partition('/')[0]}; write ./{path} for a file of that name")
    return expanded


UserPath = Annotated[str, AfterValidator(expand_home)]
