"""loss.*: a section a kind of objective."""

from typing import Literal

from pydantic import Field

from ebm.config.section import Section


class ContrastiveConfig(Section):
    kind: Literal["contrastive"] = "contrastive"
    negatives: Literal["persistent", "data", "noise"] = Field(
        "persistent",
        description="where chains start: the replay buffer (Tieleman 2008), data (CD-k, Hinton 2002), "
        "or fresh noise (Nijkamp et al. 2019)",
    )
    l2: float = Field(0.1, ge=0, description="weight of E(x_pos)^2 + E(x_neg)^2 (Du & Mordatch 2019)")
