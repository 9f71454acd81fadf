"""The one error that users see: what is wrong, what was expected, what was found, what would fix it."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input, named. Printed without a traceback by the command line tools (see `cli.run`).

    Args:
        what: the thing that is wrong, by name.
        expected, found: both sides of the mismatch, in the user's units.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, expected: object = None, found: object = None, fix: str | None = None):
        lines = [what]
        for label, value in (("expected", expected), ("found", found), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        super().__init__("\n".join(lines))

    def in_one_line(self) -> str:
        """The message for a list of many."""
        return "; ".join(" ".join(line.split()) for line in str(self).split("\n"))


def warn(what: str, *, expected: object = None, found: object = None, fix: str | None = None) -> None:
    """Prints a warning to standard error with the parts of a `UserError`; the program goes on."""
    print(f"warning: {UserError(what, expected=expected, found=found, fix=fix)}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str], count: int = 5, by: Callable[[str], str] = str) -> str:
    """The known names as text, those closest to `name` first; `by` gives what is compared of each."""
    ranked = sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name, by(other)).ratio(), other))
    more = f" and {len(ranked) - count} more" if len(ranked) > count else ""
    return ", ".join(ranked[:count]) + more
