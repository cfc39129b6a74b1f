"""How a script starts and how it ends: within its ranks, with a sentence instead of a traceback for wrong input."""

import sys
import traceback
from pathlib import Path

from utils.run.lock import held, out_dirs
from utils.run.ranks import distributed


def run(main):
    """Run a script's main().

    Errors of the input (a file, a constant, a checkpoint) and Ctrl-C end it with a sentence instead of a traceback.
    Any other error shows its traceback, and then what is left on disk.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path that the terminal's encoding lacks is no error
            stream.reconfigure(errors="backslashreplace")
    out_dirs.clear()
    try:
        with distributed(), held:
            main()
    except KeyboardInterrupt:
        print(f"\n{sys.argv[0]}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT
    except Exception as error:
        if not _is_input_error(error):
            traceback.print_exc()
            raise SystemExit(f"{sys.argv[0]}: stopped by the unforeseen error above; {_what_is_left()}") from None
        named = isinstance(error, OSError) and error.filename and error.strerror
        sentence = f"{error.filename}: {error.strerror}" if named else error
        raise SystemExit(f"{sys.argv[0]}: {sentence}") from None


def _is_input_error(error):
    """Whether the error is one of the operating system, or of a class that this project defines."""
    defined_in = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or defined_in in ("data", "models", "utils")


def _what_is_left():
    """Which outputs of the script are on disk, in words."""
    for out_dir in out_dirs:
        names = sorted(path.name for path in Path(out_dir).glob("*") if path.is_file())
        if names:
            return f"{out_dir} holds {', '.join(names)}, complete, of this run or an earlier one; start again to go on"
    return "nothing was written into OUT_DIR"
