"""The constants at the top of a script, and how one run changes them without editing."""

import ast
import difflib
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from data.errors import DataError
from models.backbone import BackboneError
from utils.run.ranks import joined


class SettingError(ValueError):
    """A setting that is unknown or has a wrong value; the message says which."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message says what to do."""


INPUT_ERRORS = (BackboneError, CheckpointError, DataError, SettingError, OSError)

# What the numbers of the four scripts may be; nan and infinity are none of these.
MOST = 1e9
RANGES = {
    "EPOCHS BATCH_SIZE IMAGE_SIZE GAUSSIAN_CHIPS MAX_BAD_STEPS":
        ("a whole number from 1 to 1e9", lambda x: type(x) is int and 1 <= x <= MOST),
    "SEED CLUSTERS SEQUENCE_GAP":
        ("a whole number from 0 to 1e9", lambda x: type(x) is int and 0 <= x <= MOST),
    "LEARNING_RATE TEMPERATURE FEATURE_TEMPERATURE ENERGY_TEMPERATURE TRAIN_SCALES SCALES":
        ("above 0, 1e9 at most", lambda x: 0 < x <= MOST),
    "WEIGHT_DECAY WARMUP_EPOCHS CLIP GAMMA CLASS_WEIGHTS JITTER SPECKLE CHIP_MEMORY_GB SAVE_EVERY_MIN "
    "KL_WEIGHT FEATURE_WEIGHT LABEL_WEIGHT":
        ("from 0 to 1e9", lambda x: 0 <= x <= MOST),
    "EMA": ("from 0 to below 1", lambda x: 0 <= x < 1),
    "VAL_FRACTION": ("between 0 and 1", lambda x: 0 < x < 1),
    "VOTE_MIN_SHARE BACKGROUND": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "BALANCE": ("from 0 to 2", lambda x: 0 <= x <= 2),
}  # fmt: skip
SEVERAL = ("TRAIN_SCALES", "SCALES", "CLASS_WEIGHTS")  # tuples of such numbers
FOLDERS = ("OUT_DIR", "STORE_DIR")  # made where they are not there


def read_settings(script, arguments=None):
    """Apply `NAME=VALUE` arguments to a script's constants, print and return the result.

    Args:
        script: the script's globals(); the upper-case names that its file assigns at the top
            level are the constants. Changed in place.
        arguments: default: the command line.

    Returns:
        {name: value} of all constants, as the run uses them.

    Raises:
        SettingError: unknown name (the nearest is named), or a value of another type.
    """
    names = _constants(script["__file__"])
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        raise SystemExit(_help(script))
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingError(f"{argument!r} is not a setting; write NAME=VALUE, for example SEED=1")
        if name not in names:
            near = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0)
            raise SettingError(f"there is no constant {name}; the nearest is {near[0]}")
        script[name] = parse(name, text, script[name])
    settings = {name: script[name] for name in names}
    print("\n".join(f"{name} = {value!r}" for name, value in settings.items()), flush=True)
    return settings


def parse(name, text, default):
    """The value of `text`, of the type of `default`; the elements of a tuple likewise."""
    kind = type(default)
    if kind is str:
        return text
    if kind is tuple:
        parts = [part.strip().strip("'\"") for part in text.strip("()[] ").split(",")]
        parts = [part for part in parts if part]
        if not default:
            return tuple(parts)
        wide = float if any(isinstance(x, float) for x in default) else type(default[0])
        return tuple(parse(name, part, wide()) for part in parts)
    if kind is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise SettingError(f"{name} is True or False, not {text!r}")
    try:
        value = ast.literal_eval(text)
        if kind is float and type(value) in (int, float) or kind is int and type(value) is int:
            return kind(value)
    except (ValueError, TypeError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
        pass
    raise SettingError(f"{name} is {'a whole number' if kind is int else 'a number'}, not {text!r}")


def check_values(settings):
    """Refuse what no run can use: numbers out of their RANGES, folders that cannot be made.

    Args:
        settings: of one of the four scripts, by read_settings.

    Raises:
        SettingError: says which, and what it may be.
    """
    for names, (what, fits) in RANGES.items():
        for name in filter(settings.__contains__, names.split()):
            values = settings[name] if name in SEVERAL else (settings[name],)
            good = isinstance(values, (tuple, list)) and values
            good = good and all(type(x) in (int, float) and fits(x) for x in values)
            each = "one number or more, each " if name in SEVERAL else ""
            check(good, f"{name} is {each}{what}, not {settings[name]!r}")
    check(any(settings.get("CLASS_WEIGHTS", (1,))), "CLASS_WEIGHTS are all 0; nothing would be learned")
    weights = [settings.get(name, 1) for name in ("KL_WEIGHT", "FEATURE_WEIGHT", "LABEL_WEIGHT")]
    check(any(weights), "KL_WEIGHT, FEATURE_WEIGHT and LABEL_WEIGHT are all 0; nothing would be learned")
    board = not settings.get("TENSORBOARD") or find_spec("tensorboard")
    check(board, "TENSORBOARD=True needs the package tensorboard: pip install tensorboard")
    for name in filter(settings.__contains__, FOLDERS):
        path = Path(settings[name])
        there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        check(there.is_dir(), f"{name} {path} cannot be used: {there} is no folder; move it or set another")
        writable = name != "OUT_DIR" or os.access(there, os.W_OK)
        check(writable, f"{name} {path} cannot be used: {there} is not writable; set another")


def check(condition, sentence):
    """Raise SettingError with the sentence unless the condition holds."""
    if not condition:
        raise SettingError(sentence)


def run(main):
    """Run a script's main(); wrong input or Ctrl-C ends it with a sentence instead of a traceback."""
    try:
        with joined():
            main()
    except KeyboardInterrupt:
        print(f"\n{sys.argv[0]}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT
    except INPUT_ERRORS as error:
        named = isinstance(error, OSError) and error.filename and error.strerror
        told = f"{error.filename}: {error.strerror}" if named else error
        raise SystemExit(f"{sys.argv[0]}: {told}") from None


def _constants(path):
    """Names of the constants that a script assigns, in their order; imported ones are not its own."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    targets = (node.targets[0] for node in tree.body if isinstance(node, ast.Assign))
    return [target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()]


def _help(script):
    """The constants with their comments, as they stand in the script."""
    with open(script["__file__"], encoding="utf-8") as file:
        lines = [line.rstrip() for line in file if re.match(r"[A-Z_]+ = ", line)]
    return "\n".join([script["__doc__"], "Set any of these by NAME=VALUE:", *lines])
