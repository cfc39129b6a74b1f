"""Knowledge distillation from the EO teacher into the SAR student."""

from functools import wraps

import torch
import torch.nn.functional as F


def match_prior(logits, teacher_counts, teacher_balance, counts, balance, class_weights=(1.0,)):
    """The teacher's logits as if its chips had been drawn like the student's.

    Chips drawn with probability count^-balance show class c in proportion to count_c^(1 - balance), and a loss with
    the class weight alpha_c counts them alpha_c times. A classifier learns that prior with the rest, so what the
    student's own draws teach it differs by the logarithm of the ratio of both priors.

    Args:
        logits: [N, C], of the teacher.
        teacher_counts, teacher_balance: chips of each class, [C], > 0, and BALANCE of the teacher's stage.
            sar_feature.py counts all pairs: where small classes hold out a third of their chips and large ones a tenth,
            the shift between them is wrong by 0.15.
        counts, balance: the same of the student's.
        class_weights: CLASS_WEIGHTS of the teacher, one for all or C of them; a 0 is left as it is.

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, for the shift by log priors.
    """
    taught, wanted, alpha = (
        torch.as_tensor(values, device=logits.device, dtype=logits.dtype)
        for values in (teacher_counts, counts, class_weights)
    )
    teacher_prior = (1 - teacher_balance) * taught.log() + torch.where(alpha > 0, alpha, 1).log()
    return logits + ((1 - balance) * wanted.log() - teacher_prior)


def _in_full_precision(loss):
    """Detaches the teacher and computes the loss in float32 (float64 for float64) whatever its inputs.

    Also under autocast, which would take bf16 for the matrix products: T = 0.1 makes a rounded cosine ten times worse.
    On a GPU these products still use TF32 (`utils.run.device`), with eight times the precision of bf16.
    """

    @wraps(loss)
    def computed(student, teacher, *settings, **named):
        wide = torch.promote_types(student.dtype, torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            return loss(student.to(wide), teacher.detach().to(wide), *settings, **named)

    return computed


@_in_full_precision
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
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@_in_full_precision
def relation_loss(student, teacher, temperature=0.1):
    """KL(teacher || student) between the similarities in a batch: which other pairs each pair is like.

    The distribution of pair i is softmax over j != i of cos(f_i, f_j) / T, with the features f of one sensor.

    Args:
        student, teacher: features [N, D] and [N, E], N > 1; the teacher is detached.
        temperature: T > 0; a lower T looks at the nearest pairs only.

    Returns:
        Scalar >= 0; 0 if both sensors see the same similarities. On several ranks each compares its own pairs.

    Source: Fang et al., "SEED: Self-supervised Distillation For Visual Representation", ICLR 2021, section 3.2.
    """
    log_q, log_p = (_others(F.normalize(features), temperature) for features in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _others(unit, temperature):
    """Log distributions [N, N - 1] of each row's similarities with the other rows."""
    n = len(unit)
    # In the flat matrix every (n + 1)th element is on the diagonal, from the first one on.
    similar = (unit @ unit.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    return F.log_softmax(similar / temperature, dim=1)


@_in_full_precision
def contrastive_loss(student, teacher, temperature=0.1):
    """InfoNCE: which of the batch's photographs belongs to a radar chip, and which radar chip to a photograph.

    Args:
        student, teacher: features [N, D]; the teacher is detached.
        temperature: T > 0 of the cosines.

    Returns:
        Scalar >= 0, the mean of both directions. On several ranks each compares its own pairs. A pair that comes twice
        in a batch, as small classes do with BALANCE=1, counts as another pair.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    figure 3; van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.
    """
    similar = F.normalize(student) @ F.normalize(teacher).T / temperature
    own = torch.arange(len(similar), device=similar.device)
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


@_in_full_precision
def feature_mse(student, teacher, temperature=None):
    """Mean squared difference of the features [N, D]; the teacher is detached, and there is no temperature.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3.
    """
    return F.mse_loss(student, teacher)


@_in_full_precision
def sliced_wasserstein(student, teacher, temperature=None, directions=64):
    """Sliced Wasserstein-2 distance between the batch's features of the two sensors, and not of each pair.

    The features are projected on random directions; along each one the sorted values are compared.

    Args:
        student, teacher: features [N, D]; the teacher is detached, and there is no temperature.

    Returns:
        Scalar >= 0. On several ranks each compares its own pairs.

    Source: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015, section 3.
    """
    axes = F.normalize(torch.randn(student.shape[1], directions, dtype=student.dtype, device=student.device), dim=0)
    return F.mse_loss(*((features @ axes).sort(dim=0).values for features in (student, teacher)))


# By the names of FEATURE_LOSS: (student's features, teacher's features, temperature) -> scalar.
FEATURE_LOSSES = {
    "kl": distillation_loss, "relations": relation_loss, "contrastive": contrastive_loss, "mse": feature_mse,
    "wasserstein": sliced_wasserstein,
}  # fmt: skip
