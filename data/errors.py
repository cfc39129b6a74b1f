"""Errors of the input data, and how messages list files and reasons."""


class DataError(ValueError):
    """Input data that cannot be used; the message says what is wrong, in which file, and what to do."""


def named(items, limit=20):
    """The first `limit` items, separated by commas, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def reason(error):
    """The first line of an exception's message, or its type where it has none."""
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return message.splitlines()[0]
