"""URLs without credentials, as they are written, printed and logged."""

from __future__ import annotations

import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAIL = re.compile(r"[?#]")
_PLACE = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
"""Host and port."""
ENCODED = "in user and password write %40 for @, %23 for #, %2F for / and %3F for ?"
"""The remedy where a URL cannot be read."""


def without_credentials(text: str) -> str:
    """`text` with the URL in it, if there is one, cut down to scheme, host, port and path.

    User, password, query and fragment go: any of them may hold a key. What stands before the URL stays, as in
    "--reward-url=http://..."; all that stands behind it counts as a part of it. Where a password holds a /, ? or # as
    it is, so that what stands before that is no host, host and path go too.
    """
    found = _SCHEME.search(text)
    if not found:
        return text
    authority, slash, path = _TAIL.split(text[found.end() :], maxsplit=1)[0].partition("/")
    if "@" not in authority and "@" in text[found.end() :] and not _PLACE.fullmatch(authority):
        return text[: found.end()] + "***"
    return text[: found.end()] + authority.rpartition("@")[2] + slash + path


def redacted(settings: Any) -> Any:
    """JSON-like settings with every string `without_credentials`; tuples, lists and dicts are copied."""
    if isinstance(settings, str):
        return without_credentials(settings)
    if isinstance(settings, dict):
        return {name: redacted(value) for name, value in settings.items()}
    if isinstance(settings, tuple | list):
        return type(settings)(redacted(value) for value in settings)
    return settings
