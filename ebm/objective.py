"""The objective: energy and loss as one module, so that what is differentiated is one forward of what is wrapped."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm.losses import LossOutput


class Objective(nn.Module):
    """Holds the energy; its forward is the whole loss.

    Losses call the energy once, or several times, or its gradient; several forwards of a module that averages its
    gradients over ranks break before one backward, so the wrapping goes around this one. A spectrally normalised
    weight is computed once a forward, with one power iteration, however often the loss uses it.
    """

    def __init__(self, energy: nn.Module, loss: Callable[..., LossOutput]):
        super().__init__()
        self.energy, self.loss = energy, loss

    def forward(self, x_pos: Tensor, x_neg: Tensor | None, **settings) -> LossOutput:
        with parametrize.cached():
            return self.loss(self.energy, x_pos, x_neg, **settings)
