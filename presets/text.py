"""Text from outside on its way to a terminal or into a message: without control characters, and short."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

LONGEST_SHOWN = 60  # characters of a value in an error message
MOST_SHOWN = 20  # names in a list of them

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = LONGEST_SHOWN
_SHORT.maxlevel = 2


def printable(text: str) -> str:
    """One line of text in which nothing moves the cursor, turns the line round or ends it: such characters as escapes.

    Escaped is what Unicode does not call printable: control characters with ESC and the 8-bit ones, directions of
    writing (U+202E), halves of characters, separators but the blank.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def printable_lines(text: str) -> str:
    """The same, line by line: ends of lines stay."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def shown(value: object) -> str:
    """A value of any kind and size, as an error message shows it: in quotes where it is text, and cut."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**LONGEST_SHOWN:
        return f"a number of over {LONGEST_SHOWN} digits"  # which Python may refuse to write out
    return _SHORT.repr(value)


def listed(names: Iterable[object]) -> str:
    """Names with commas between them, the first `MOST_SHOWN`."""
    found = [str(name) for name in names]
    told = ", ".join(
        name if len(name) <= LONGEST_SHOWN else name[:LONGEST_SHOWN] + "..." for name in found[:MOST_SHOWN]
    )
    more = f" and {len(found) - MOST_SHOWN:,} more" if len(found) > MOST_SHOWN else ""
    return told + more
