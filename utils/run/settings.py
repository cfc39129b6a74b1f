"""The constants at the top of a script, and how to change them for one run without editing the file."""

import ast
import difflib
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from utils.run.rules import CHECKPOINTS, FOLDERS, NUMBERS, PATHS, RULES, WITHOUT_EFFECT


class SettingError(ValueError):
    """A setting that is unknown or has a wrong value; the message says which."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message says what to do."""


def read_settings(script, arguments=None):
    """Apply `NAME=VALUE` arguments to a script's constants, check, print and return them.

    An argument that has no effect beside the other constants is announced.

    Args:
        script: the script's globals(); the upper-case names that its file assigns at the top
            level are the constants. Changed in place.
        arguments: default: the command line.

    Returns:
        {name: value} of all constants, as the run uses them.

    Raises:
        SettingError: unknown name (the message names the nearest), value of another type, or a value
            that `utils.run.rules` does not allow.
    """
    names = _constants(script["__file__"])
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        _print_help(script)
        raise SystemExit(0)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingError(f"{argument!r} is not a setting; write NAME=VALUE, for example SEED=1")
        if name not in names:
            takes_checkpoint = CHECKPOINTS.intersection(names) if name.upper() in CHECKPOINTS else ()
            near = list(takes_checkpoint) or difflib.get_close_matches(name.upper(), names, n=1, cutoff=0)
            raise SettingError(f"there is no constant {name}; the nearest is {near[0]}")
        script[name] = parse(name, text, script[name])
    for name in PATHS.intersection(names):
        script[name] = os.path.expanduser(os.path.expandvars(script[name]))
    settings = {name: script[name] for name in names}
    print("\n".join(f"{name} = {value!r}" for name, value in settings.items()), flush=True)
    _check_values(settings)
    for name in sorted(WITHOUT_EFFECT.keys() & {argument.partition("=")[0] for argument in arguments}):
        other, values = WITHOUT_EFFECT[name]
        if settings.get(other) in values:
            print(f"{name} has no effect with {other}={settings[other]}", flush=True)
    return settings


def parse(name, text, default):
    """The value of `text`, of the type of `default`; the elements of a tuple likewise."""
    kind = type(default)
    if kind is str:
        return text
    if kind is tuple:
        text = re.sub(r"^\((.*)\)$|^\[(.*)\]$", r"\1\2", text.strip())  # a name may end with a bracket
        parts = [part.strip().strip("'\"") for part in text.split(",")]
        parts = [part for part in parts if part]
        if not default and name not in NUMBERS:
            return tuple(parts)
        element = float if name in NUMBERS or any(isinstance(x, float) for x in default) else type(default[0])
        return tuple(parse(name, part, element()) for part in parts)
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


def _check_values(settings):
    """Raise SettingError for values that no run can use, and folders that cannot be made."""
    for name in filter(RULES.__contains__, settings):
        rule, value = RULES[name], settings[name]
        if rule.several:
            allowed = isinstance(value, (tuple, list)) and value and all(map(rule.allows, value))
            check(allowed, f"{name} is one number or more, each {rule.text}, not {value!r}")
        check(rule.several or rule.allows(value), f"{name} is {rule.text}, not {value!r}")
    check(any(settings.get("CLASS_WEIGHTS", (1,))), "CLASS_WEIGHTS are all 0; nothing would be learned")
    weights = [settings.get(name, 1) for name in ("KL_WEIGHT", "FEATURE_WEIGHT", "LABEL_WEIGHT")]
    check(any(weights), "KL_WEIGHT, FEATURE_WEIGHT and LABEL_WEIGHT are all 0; nothing would be learned")
    installed = not settings.get("TENSORBOARD") or find_spec("tensorboard")
    check(installed, "TENSORBOARD=True needs the package tensorboard: pip install tensorboard")
    for name in FOLDERS.intersection(settings):
        path = Path(settings[name])
        existing = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        check(
            existing.is_dir(),
            f"{name} {path} cannot be used: {existing} is no folder; move it or set another",
        )
        writable = name != "OUT_DIR" or os.access(existing, os.W_OK)
        check(writable, f"{name} {path} cannot be used: {existing} is not writable; set another")


def check(condition, sentence):
    """Raise SettingError with the sentence unless the condition holds."""
    if not condition:
        raise SettingError(sentence)


def _constants(path):
    """Names of the constants that a script assigns, in their order; imported ones do not count."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    targets = (node.targets[0] for node in tree.body if isinstance(node, ast.Assign))
    return [target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()]


def _print_help(script):
    """Print the constants with their comments, as they are written in the script."""
    with open(script["__file__"], encoding="utf-8") as file:
        lines = [line.rstrip() for line in file if re.match(r"[A-Z_]+ = ", line)]
    try:
        print("\n".join([script["__doc__"], "Set any of these by NAME=VALUE:", *lines]), flush=True)
    except BrokenPipeError:  # as by `--help | head`; what is left must not be written at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
