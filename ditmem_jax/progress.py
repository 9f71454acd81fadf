"""Progress bars of rich, as the library's functions draw them in terminals and in notebooks.

In a terminal rich holds back what is printed while a bar is drawn, and shows it above the bar. In a notebook a bar is an
output of its own and nothing need be held back; rich would call itself without end there, as soon as a line without
its end is held while ipykernel flushes the streams.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def make_progress(*columns: ProgressColumn, console: Console | None = None, **options: Any) -> Progress:
    """Return a display of `columns` for a `with` block; `options` are those of `rich.progress.Progress`."""
    console = console or get_console()
    hold = not console.is_jupyter
    return Progress(*columns, console=console, redirect_stdout=hold, redirect_stderr=hold, **options)


def track(
    items: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    disable: bool = False,
) -> Iterator[T]:
    """Yield the items and draw a bar of how many are done, of `total` or their number."""
    with make_progress(console=console, disable=disable) as progress:
        yield from progress.track(items, total, description=description)
