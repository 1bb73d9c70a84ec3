"""Exceptions raised by fastreg; every one derives from :class:`FastregError`.

Messages read "<function>: <argument> must be <expected>, got <received> (<hint>)".
"""

from __future__ import annotations


class FastregError(Exception):
    """A request that fastreg cannot serve; the message says what to do instead."""


class UnsupportedOperation(FastregError):
    """A tracked parameter reaches an operation for which no exact rule is registered."""
