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

    Args:
        of_scores: the loss differentiates dE/dx, to which some weights (a bias of the head) may be nothing. They get a
            gradient of 0 then: the ranks wait for every weight's.
    """

    def __init__(self, energy: nn.Module, loss: Callable[..., LossOutput], of_scores: bool = False):
        super().__init__()
        self.energy, self.loss, self.of_scores = energy, loss, of_scores

    def forward(self, x_pos: Tensor, x_neg: Tensor | None, **settings) -> LossOutput:
        with parametrize.cached():
            output = self.loss(self.energy, x_pos, x_neg, **settings)
        if not self.of_scores:
            return output
        nothing = 0.0 * sum(p.sum() for p in self.energy.parameters() if p.requires_grad)
        return output._replace(loss=output.loss + nothing)
