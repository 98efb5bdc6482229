"""The text for small language models that is at hand."""

from __future__ import annotations

from bayesgn.datasets.lookup import DatasetUnavailable, Text
from bayesgn.datasets.series import python_docs, shakespeare


def text() -> Text:
    """Twelve plays of Shakespeare from a data folder; the help topics of Python, which are everywhere, where there is none.

    Example:
        >>> found = text()
        >>> found.name in ("shakespeare", "python_docs"), len(found.text) > 400_000
        (True, True)
    """
    try:
        return shakespeare()
    except DatasetUnavailable:
        return python_docs()
