"""Markup that is not escaped twice: text becomes `Html` once, and `Html` stays as it is."""

import html


class Html(str):
    """Finished markup."""


def escape(content: object) -> Html:
    """Any value as markup: `Html` as it is, the rest as text."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def tag(element: str, /, *content: object, **attributes: object) -> Html:
    """An element. Underscores end names that Python reserves (`class_`) and stand for hyphens elsewhere.

    Attributes that are None are left out, those that are True stand without a value.
    """
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None:
            written += f' {key}="{html.escape(str(value))}"'
    if element in _VOID:
        return Html(f"<{element}{written}>")
    return Html(f"<{element}{written}>{''.join(map(escape, content))}</{element}>")


_VOID = ("br", "img", "input", "meta")
