"""The constants at the top of a script, and how one run changes them without editing."""

import ast
import difflib
import re
import sys

from data.errors import DataError
from models.backbone import BackboneError


class SettingError(ValueError):
    """A setting that is unknown or has a wrong value; the message says which."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message says what to do."""


INPUT_ERRORS = (BackboneError, CheckpointError, DataError, SettingError, OSError)


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
    except (ValueError, SyntaxError):
        pass
    raise SettingError(f"{name} is {'a whole number' if kind is int else 'a number'}, not {text!r}")


def check(condition, sentence):
    """Raise SettingError with the sentence unless the condition holds."""
    if not condition:
        raise SettingError(sentence)


def run(main):
    """Run a script's main(); wrong input ends it with a sentence instead of a traceback."""
    try:
        main()
    except INPUT_ERRORS as error:
        raise SystemExit(f"{sys.argv[0]}: {error}") from None


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
