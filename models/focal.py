"""Focal loss, for classes of very different size."""

import torch
import torch.nn.functional as F


def focal_loss(logits, labels, gamma=2.0, class_weights=None, total_weight=None, counted=None):
    """Mean focal loss, FL = -alpha_t (1 - p_t)^gamma log p_t.

    The mean is weighted: the sum over the chips divided by the sum of their alpha. So at gamma = 0 the loss
    equals `torch.nn.functional.cross_entropy(logits, labels, class_weights)`.

    Args:
        logits: [N, C], any floating dtype; the loss is computed in float32 or, for float64, in float64.
        labels: [N] int64, 0..C-1.
        gamma: focusing parameter, >= 0. A higher gamma gives less weight to chips with a high p_t.
        class_weights: alpha, [C], or None for 1.
        total_weight: what the weighted sum is divided by, [], if it is not the sum of these chips' alpha: ranks
            that share a batch need a common one.
        counted: bool [N], the chips that count, or None for all; without any the loss is 0.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4 and 5.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(logits.to(wide), dim=1).gather(1, labels[:, None]).squeeze(1)
    # The floor keeps the gradient of x^gamma finite at x = 0 for gamma < 1.
    loss = -((-torch.expm1(log_p).clamp_max(-1e-12)) ** gamma) * log_p if gamma else -log_p
    if class_weights is None and counted is None:
        return loss.mean()
    alpha = torch.ones_like(loss) if class_weights is None else class_weights.to(wide)[labels]
    if counted is not None:
        alpha = alpha * counted
    total = alpha.sum() if total_weight is None else total_weight
    return (alpha * loss).sum() / torch.where(total > 0, total, 1.0)
