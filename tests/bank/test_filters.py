"""Filters: what they may say, and what is refused before LanceDB sees it."""

import pytest

from ditmem_jax.bank import filters
from ditmem_jax.errors import UserError

COLUMNS = ["id", "caption", "motion", "row", "Motion Score"]


@pytest.mark.parametrize(
    ("where", "sql"),
    [
        ("motion > .5", '"motion" > 0.5'),
        ("MOTION == -1e3", '"motion" = -1e3'),
        ("row = 1 AND true", '"row" = 1 AND TRUE'),
        ("`Motion Score` BETWEEN 1 AND 2", '"Motion Score" BETWEEN 1 AND 2'),
        ("not (id in ('a''b', 'c\\d') or id is not null)", "NOT (\"id\" IN ('a''b', 'c\\d') OR NOT \"id\" IS NULL)"),
        ("caption NOT LIKE 'a\\%_' -- why", "\"caption\" NOT LIKE 'a\\%_'"),
        ("caption ilike '%; drop table videos'", "\"caption\" ILIKE '%; drop table videos'"),
    ],
)  # fmt: skip
def test_a_filter_is_written_anew(where, sql):
    assert filters.checked(where, COLUMNS) == sql


CALLS = [
    "repeat('a', 9)",
    "length(caption)",
    "regexp_like(caption, 'a')",
    "read_csv('/etc/passwd')",
    "id(caption)",
]
OTHERS = [
    "motion + 1",
    "caption || caption",
    "(SELECT 1)",
    "CASE WHEN true THEN 1 END",
    "motion::int",
    "id.motion",
]
OTHERS += [
    "?",
    "$1",
    "[1]",
    "DATE '2020-01-01'",
    "'a' 'b'",
    "gone",
    '"gone"',
    "`gone`",
    "*",
    "1; motion > 1",
    "'a",
]
LIKES = ["caption LIKE id", "caption LIKE NULL", "caption SIMILAR TO 'a'", "caption LIKE 'a' ESCAPE '!'"]
LIKES += [
    " OR ".join(["caption LIKE 'a'"] * (filters.PATTERNS + 1)),
    f"id LIKE '{'%a' * (filters.WILDCARDS + 1)}'",
]
HUGE = [
    f"id = '{'a' * filters.LENGTH}'",
    f"row IN ({'1,' * filters.TOKENS}1)",
    "(" * 500,
    "NOT " * 500 + "true",
]
HUGE += ["struct(" * 500, "true OR (" * 150 + "true" + ")" * 150]


@pytest.mark.parametrize("where", ["", " ", *(f"motion = {x}" for x in CALLS + OTHERS), *LIKES, *HUGE])
def test_all_else_is_refused_with_the_columns(where):
    with pytest.raises(UserError, match=r"the filter .* does not fit(.|\n)*caption, motion"):
        filters.checked(where, COLUMNS)
