"""What a trajectory model is trained on.

    a_soft = (1 - beta) a + beta pi_past(context)                                                 (1)
    L = w_a MSE(a_hat, a_soft) + w_s SmoothL1(s_hat, s_next) + w_R SmoothL1(R_hat, R_next)         (2)

(1) is the progressive self-evolution regularisation of Decision Mamba (Lv et al. 2024, arXiv:2406.05427): labels are
refined by the policy of the training stage before, which is frozen. (With the current policy in its place the gradient
of (2) would only be scaled.) (2) adds that paper's inverse learning objectives; models without these heads are trained
on the first term alone. Discrete actions take cross entropy in place of the first term.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.data import TrajectoryBatch
from ssmkit.models.trajectory import Prediction


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """w_s and w_R of (2); w_a is what remains to 1."""

    states: float = 0.05
    returns: float = 0.05

    @property
    def actions(self) -> float:
        """w_a."""
        return 1.0 - self.states - self.returns


def refined_actions(actions: Tensor, past: Tensor, beta: float, *, discrete: bool) -> Tensor:
    """Equation (1); for discrete actions a mixture of the one-hot label and the past policy's probabilities."""
    opinion = past.softmax(dim=-1) if discrete else past
    return (1.0 - beta) * actions + beta * opinion.detach()


def action_loss(predicted: Tensor, target: Tensor, mask: Tensor, *, discrete: bool) -> Tensor:
    """Mean over real steps; predicted and target (batch, K, action_dim), mask (batch, K)."""
    if discrete:
        return mean_over(mask, F.cross_entropy(predicted.flatten(0, 1), target.flatten(0, 1), reduction="none"))
    return mean_over(mask, F.mse_loss(predicted, target, reduction="none").mean(dim=-1))


def mean_over(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of `values` (as many as mask has elements) where mask is True."""
    return torch.where(mask.flatten(), values.flatten(), 0.0).sum() / mask.sum()


def trajectory_loss(
    prediction: Prediction,
    batch: TrajectoryBatch,
    *,
    discrete: bool,
    weights: LossWeights | None,
    past_actions: Tensor | None = None,
    beta: float = 0.0,
) -> dict[str, Tensor]:
    """The terms of (2) and their sum, as {"loss": ..., "action": ..., ...}.

    Args:
        weights: None trains actions alone.
        past_actions: Predictions of the past policy for (1), with `beta`; None refines nothing.
    """
    target = batch.actions
    if past_actions is not None:
        target = refined_actions(target, past_actions, beta, discrete=discrete)
    terms = {"action": action_loss(prediction.actions, target, batch.mask, discrete=discrete)}
    if weights is None:
        return {"loss": terms["action"], **terms}
    assert prediction.states is not None
    assert prediction.returns is not None
    for name, predicted, wanted in (
        ("state", prediction.states, batch.next_states),
        ("return", prediction.returns, batch.next_returns),
    ):
        terms[name] = mean_over(batch.mask, F.smooth_l1_loss(predicted, wanted, reduction="none").mean(dim=-1))
    loss = weights.actions * terms["action"] + weights.states * terms["state"] + weights.returns * terms["return"]
    return {"loss": loss, **terms}
