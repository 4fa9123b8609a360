"""What every section of the config shares."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def kind_by_default(kind: str) -> BeforeValidator:
    """For a union of sections: which one values without a `kind` are of."""

    def complete(values: Any) -> Any:
        return {"kind": kind, **values} if isinstance(values, dict) and "kind" not in values else values

    return BeforeValidator(complete)
