"""Progress bars hold back what is printed in terminals, and nothing in notebooks."""

import io
import sys

import pytest
from rich.console import Console

from ditmem_jax.progress import track


@pytest.mark.parametrize("kind", ["jupyter", "terminal"])
def test_a_bar_holds_back_what_is_printed_in_terminals_only(kind):
    console = Console(file=io.StringIO(), **{f"force_{kind}": True})
    streams = sys.stdout, sys.stderr
    held = [(sys.stdout, sys.stderr) != streams for _ in track(range(2), "some", console=console)]
    assert held == [kind == "terminal"] * 2
    assert (sys.stdout, sys.stderr) == streams


def test_a_bar_counts_to_its_end():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    assert list(track(iter("abc"), "letters", 3, console=console)) == ["a", "b", "c"]
    assert "letters" in console.file.getvalue() and "100%" in console.file.getvalue()
