"""HTML and SVG as text; what is not markup already is escaped."""

import html
from typing import Any


class Markup(str):
    """Text that needs no escaping."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; `tag('td', 3.2, cls='best')` is `<td class="best">3.2</td>`.

    Args:
        name: Of the element.
        children: Markup as it is, other values escaped; None is left out, lists and tuples are taken apart.
        attributes: None is left out; `cls` is `class`, and an underscore is a hyphen.
    """
    opening = ''.join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f'<{name}{opening}>{join(children)}</{name}>')


def void(name: str, /, **attributes: Any) -> Markup:
    """An HTML element without content, such as `<img>`."""
    return Markup(tag(name, **attributes).removesuffix(f'</{name}>'))


def join(children: Any) -> Markup:
    """Children below each other, escaped where they are not markup."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else html.escape(str(child)))
    return Markup(''.join(parts))


MISSING = '–'


def table(caption: Any, head: list[Markup], *bodies: list[Markup]) -> Markup:
    """A table that scrolls on its own where it is wider than the page.

    Args:
        caption: What its figures are.
        head: Rows of headings.
        bodies: Groups of rows.
    """
    parts = [tag('caption', caption), tag('thead', head), *(tag('tbody', body) for body in bodies)]
    return tag('div', tag('table', parts), cls='scroll')


def head_row(*names: Any) -> Markup:
    """A row of headings; what is not an element yet stands above figures."""
    return tag('tr', [name if isinstance(name, Markup) else tag('th', name, scope='col') for name in names])


def words(*names: str) -> list[Markup]:
    """Headings above words."""
    return [tag('th', name, scope='col', cls='text') for name in names]


def row(name: Any, *cells: Any) -> Markup:
    """A row of a table; cells that are not elements yet are figures, aligned to the right."""
    return tag(
        'tr', tag('th', name, scope='row'), [cell if isinstance(cell, Markup) else tag('td', cell) for cell in cells]
    )


def text(value: Any) -> Markup:
    """A cell of words, aligned to the left."""
    return tag('td', MISSING if value is None else value, cls='text')


def number(value: float | None, decimals: int, factor: float = 1.0) -> str:
    """Fixed decimals, thousands apart; a dash where there is nothing."""
    return MISSING if value is None else f'{value * factor:,.{decimals}f}'
