"""What all sections of the config share."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A section of the config. It is frozen, and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def kind_by_default(kind: str) -> BeforeValidator:
    """For a union of sections: values without a `kind` are read as those of `kind`."""

    def complete(values: Any) -> Any:
        return {"kind": kind, **values} if isinstance(values, dict) and "kind" not in values else values

    return BeforeValidator(complete)
