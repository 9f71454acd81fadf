"""A bank survives SIGKILL; `python -m tests.bank.kills` does it fifty times."""

import pytest

from tests.bank.kills import run


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_commits(tmp_path):
    assert run(str(tmp_path / "bank"), 3) > 3
