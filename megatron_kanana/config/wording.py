"""Errors of libraries in the words of a message."""

from __future__ import annotations

MOST_LETTERS = 300


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not at length; its class if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
