"""Knowledge distillation from the EO teacher into the SAR student."""

import torch
import torch.nn.functional as F


def distillation_loss(student, teacher, temperature=1.0):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Use it for logits (distributions over the classes) or for features (distributions over the feature
    channels). The teacher is detached: it gets no gradient.

    Args:
        student: [N, D], any floating dtype; the loss is computed in float32 or, for float64, in float64.
        teacher: [N, D].
        temperature: T > 0. A higher T makes the distributions softer. The factor T^2 keeps the size of the
            student's gradient independent of T, to first order.

    Returns:
        Scalar >= 0; 0 if both distributions are equal.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(wide) / temperature, dim=1)
    log_p = F.log_softmax(teacher.detach().to(wide) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
