"""Knowledge distillation from the EO teacher into the SAR student."""

import torch
import torch.nn.functional as F


def distillation_loss(student, teacher, temperature=1.0):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Serves logits (class distributions) and features (the softened distributions over the
    feature channels) alike. The teacher is detached: no gradient flows into it.

    Args:
        student: [N, D], any floating dtype; computed in float32 at least.
        teacher: [N, D].
        temperature: T > 0; the higher, the softer. T^2 keeps the size of the gradient
            with respect to the student independent of T, to first order.

    Returns:
        Scalar >= 0, 0 where both distributions agree.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(wide) / temperature, dim=1)
    log_p = F.log_softmax(teacher.detach().to(wide) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
