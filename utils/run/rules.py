"""What the constants at the top of the scripts may be, and which of them leave a run's result as it is."""

import math
from collections.abc import Callable
from typing import NamedTuple

CLUSTER_BY = ("auto", "features", "sequence", "both", "none")
FEATURE_LOSS = ("kl", "relations", "contrastive", "mse", "wasserstein")
VOTE = ("mixture", "product", "soft", "hard")
MOST = 1e9  # above every sensible value of every number


class Rule(NamedTuple):
    """text: the allowed values in words; allows: value -> bool; several: a tuple, of which each must fit."""

    text: str
    allows: Callable
    several: bool = False


def whole_number(least):
    return Rule(f"a whole number from {least} to 1e9", lambda x: type(x) is int and least <= x <= MOST)


def number(text, allows, several=False):
    # Comparisons with nan are false, so it never fits.
    return Rule(text, lambda x: type(x) in (int, float) and allows(x), several)


def _is_range(x):
    """No number, or two finite numbers, the first below the second."""
    if not isinstance(x, (tuple, list)) or not {type(value) for value in x} <= {int, float}:
        return False
    return len(x) == 0 or len(x) == 2 and -math.inf < x[0] < x[1] < math.inf


def one_of(*choices):
    return Rule(f"one of {', '.join(map(repr, choices))}", lambda x: x in choices)


POSITIVE = number("above 0, 1e9 at most", lambda x: 0 < x <= MOST)
NOT_NEGATIVE = number("from 0 to 1e9", lambda x: 0 <= x <= MOST)
SHARE = number("from 0 to 1", lambda x: 0 <= x <= 1)

RULES = {
    "EPOCHS": whole_number(1),
    "BATCH_SIZE": whole_number(1),
    "IMAGE_SIZE": whole_number(1),
    "OOD_CHIPS": whole_number(2),
    "MAX_BAD_STEPS": whole_number(1),
    "SEED": whole_number(0),
    "CLUSTERS": whole_number(0),
    "SEQUENCE_GAP": whole_number(0),
    "LEARNING_RATE": POSITIVE,
    "TEMPERATURE": POSITIVE,
    "FEATURE_TEMPERATURE": POSITIVE,
    "OOD_TEMPERATURE": POSITIVE,
    "TRAIN_SCALES": POSITIVE._replace(several=True),
    "WEIGHT_DECAY": NOT_NEGATIVE,
    "WARMUP_EPOCHS": NOT_NEGATIVE,
    "CLIP": NOT_NEGATIVE,
    "GAMMA": NOT_NEGATIVE,
    "CLASS_WEIGHTS": NOT_NEGATIVE._replace(several=True),
    "JITTER": NOT_NEGATIVE,
    "SPECKLE": NOT_NEGATIVE,
    "KL_WEIGHT": NOT_NEGATIVE,
    "FEATURE_WEIGHT": NOT_NEGATIVE,
    "LABEL_WEIGHT": NOT_NEGATIVE,
    "CHIP_MEMORY_GB": NOT_NEGATIVE,
    "SAVE_EVERY_MIN": NOT_NEGATIVE,
    "EMA": number("from 0 to below 1", lambda x: 0 <= x < 1),
    "VAL_FRACTION": number("between 0 and 1", lambda x: 0 < x < 1),
    "VOTE_MIN_SHARE": SHARE,
    "CLASS_SHARES": SHARE,
    "LABELLED_SHARE": SHARE,
    "BACKGROUND": SHARE,
    "BALANCE_ENTITIES": SHARE,
    "ROTATION": number("from 0 to 180", lambda x: 0 <= x <= 180),
    "BALANCE": number("from 0 to 2", lambda x: 0 <= x <= 2),
    "GREY_RANGE": Rule("empty, or two numbers, black and white, the first below the second", _is_range),
    "SENSOR": one_of("EO", "SAR"),
    "FEATURE_LOSS": one_of(*FEATURE_LOSS),
    "CLUSTER_BY": one_of(*CLUSTER_BY),
    "VOTE": one_of(*VOTE),
    "CLUSTER_SCORE": one_of("features", "mean", "none"),
}

# Settings without effect beside some values of another one.
WITHOUT_EFFECT = {
    "CLASS_SHARES": ("VOTE", ("product", "soft", "hard")),
    "VOTE_MIN_SHARE": ("VOTE", ("mixture",)),
    "CLUSTERS": ("CLUSTER_BY", ("sequence", "both", "none")),
    "ROTATIONS": ("TTA", (False,)),
    "SCALES": ("TTA", (False,)),
    "CHOOSE_SCALES": ("ALL_VIEWS", (False,)),
    "TEMPERATURE": ("KL_WEIGHT", (0,)),
    "MATCH_PRIOR": ("KL_WEIGHT", (0,)),
    "FEATURE_LOSS": ("FEATURE_WEIGHT", (0,)),
    "FEATURE_TEMPERATURE": ("FEATURE_WEIGHT", (0,)),
}

NUMBERS = {"GREY_RANGE"}  # tuples of numbers that may be empty

# In these "~" and "$NAME" are expanded.
PATHS = {
    "DATA_ROOT", "TEST_DIR", "OUT_DIR", "STORE_DIR", "TEACHER", "STUDENT", "CHECKPOINT", "WEIGHTS", "INIT", "OUT",
    "ENTITIES",
}  # fmt: skip
CHECKPOINTS = {"TEACHER", "STUDENT", "CHECKPOINT"}  # one of them in each script but the first
FOLDERS = {"OUT_DIR", "STORE_DIR"}  # made if they do not exist

# Where and how a run computes, not what: a stopped run goes on with other values of these. BATCH_SIZE counts
# by its sum over the ranks; what a path leads to is compared by content (`utils.run.identity`).
NO_EFFECT = PATHS | {
    "BATCH_SIZE", "DEVICE", "CHIP_MEMORY_GB", "COMPILE", "RESUME", "SAVE_EVERY_MIN", "MAX_BAD_STEPS", "TENSORBOARD",
}  # fmt: skip
