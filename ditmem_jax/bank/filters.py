"""The filters of a bank: a small part of SQL, checked and written anew before LanceDB sees it.

DataFusion, which runs a filter, has functions such as `repeat` that ask for any amount of memory and end the whole
process when it is not there. So a filter may hold only what costs little for each row: comparisons of the bank's
columns with numbers and texts, AND, OR, NOT, IN, BETWEEN, LIKE, ILIKE, IS NULL and parentheses, in bounded amounts.
LanceDB gets the text of the parsed expression, never the user's own, which another parser may read differently.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ditmem_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from sqlglot import exp
    from sqlglot.tokens import Token

LENGTH = 4000  # characters
TOKENS = 600  # names, values, operators and parentheses
PATTERNS = 4  # LIKE and ILIKE, each of which reads all text of a column
WILDCARDS = 32  # % and _ in all patterns


def checked(where: str, columns: Sequence[str]) -> str:
    """Return a filter over these columns as SQL for LanceDB.

    Raises:
        UserError: for anything beside the operators above, an unknown column, or more than the bounds allow.
    """
    from sqlglot import Dialect, exp  # half a second, for which a bank without filters need not wait
    from sqlglot.errors import ParseError, TokenError

    dialect = Dialect.get_or_raise(
        "sqlite"
    )  # its names stand in `x` or "x", its texts in 'x' without escapes
    try:
        if len(where) > LENGTH:
            raise ValueError(f"{len(where)} characters, of at most {LENGTH}")
        tokens = _known(dialect.tokenize(where), columns)
        if not tokens:
            raise ValueError("nothing")
        (tree,) = dialect.parser().parse_into(exp.Condition, tokens, where)
        _require_plain(tree)
        return tree.sql(identify=True, comments=False)
    except ParseError as error:
        reason = error.errors[0]["description"]
    except RecursionError:
        reason = "nested too deeply"
    except (TokenError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"the filter {where[:200]!r} does not fit the bank",
        expected=f"comparisons, AND, OR, NOT, IN, BETWEEN, LIKE, IS NULL over {', '.join(columns)}, "
        "such as: duration > 2 AND caption LIKE '%ball%'",
        found=reason,
    )


def _known(tokens: "Sequence[Token]", columns: Sequence[str]) -> "list[Token]":
    """The tokens, columns as quoted names, all others known: for some the parser takes exponential time."""
    from sqlglot.tokens import Token, TokenType

    if len(tokens) > TOKENS:
        raise ValueError(f"{len(tokens)} names, values and operators, of at most {TOKENS}")
    kinds = "AND OR NOT IN BETWEEN LIKE ILIKE IS NULL TRUE FALSE EQ NEQ LT LTE GT GTE DASH DOT COMMA L_PAREN R_PAREN"
    allowed = {TokenType[kind] for kind in [*kinds.split(), "STRING", "NUMBER"]}
    names = {name.lower(): name for name in columns} | {name: name for name in columns}
    found = []
    for token in tokens:
        name = names.get(token.text, names.get(token.text.lower()))
        if token.token_type in allowed:
            found.append(token)
        elif name is not None:
            found.append(Token(TokenType.IDENTIFIER, name))
        else:
            text = token.text[:50]
            raise ValueError(
                f"{text!r}, no column or operator of a filter (nearest: {nearest(text, columns)})"
            )
    return found


def _require_plain(tree: "exp.Expression") -> None:
    """Raises ValueError for a part that filters do not have, and for too many patterns."""
    from sqlglot import exp

    patterns = (exp.Like, exp.ILike)
    operators = (exp.And, exp.Or, exp.Not, exp.Paren, exp.Neg, exp.In, exp.Between, exp.Is)
    compared = (exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE)
    values = (exp.Column, exp.Identifier, exp.Literal, exp.Null, exp.Boolean)
    for part in tree.walk():
        if type(part) not in {*patterns, *operators, *compared, *values} or part.args.get("table"):
            raise ValueError(part.sql()[:50])
    likes = list(tree.find_all(*patterns))
    if any(not like.expression.is_string for like in likes):
        raise ValueError("LIKE without a text in quotes")
    if len(likes) > PATTERNS:
        raise ValueError(f"{len(likes)} times LIKE, of at most {PATTERNS}")
    wildcards = sum(like.expression.name.count(sign) for like in likes for sign in "%_")
    if wildcards > WILDCARDS:
        raise ValueError(f"{wildcards} wildcards % and _, of at most {WILDCARDS}")
