"""What is wrong with the input."""


class DataError(ValueError):
    """Input that cannot be used; the message says what, in which file, and what to do."""


def named(items, limit=20):
    """The first items, comma separated, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def reason(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0]
