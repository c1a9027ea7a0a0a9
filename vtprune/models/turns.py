"""The messages of a conversation, as a prompt takes them; imported without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: "system", "user" or "assistant".
        text: what it says.
        media: how many of the prompt's media items it has; turns take them in order.
        places: for each of them, the number of characters of the text before it, ascending; ()
            where the turn begins with them.
    """

    role: str
    text: str
    media: int = 0
    places: tuple[int, ...] = ()
