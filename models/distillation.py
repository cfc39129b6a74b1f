"""Knowledge distillation from the EO teacher into the SAR student."""

import torch
import torch.nn.functional as F


def match_prior(logits, counts, teacher_balance, student_balance):
    """The teacher's logits as if its chips had been drawn like the student's.

    Chips drawn with probability count^-balance show class c in proportion to count_c^(1 - balance). A classifier
    learns that prior with the rest, so the teacher's log odds differ by (teacher_balance - student_balance) log count
    from what the student's own draws teach it.

    Args:
        logits: [N, C]; counts: [C], training chips of each class, > 0.
        teacher_balance, student_balance: BALANCE of both stages.

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, for the shift by log priors.
    """
    log_counts = torch.log(torch.as_tensor(counts, device=logits.device, dtype=logits.dtype))
    return logits + (teacher_balance - student_balance) * log_counts


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
