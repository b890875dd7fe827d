"""Tables as markdown."""

from collections.abc import Sequence


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table; nothing if there are no rows."""
    lines = [f"| {' | '.join(_cell(c) for c in row)} |" for row in (head, *rows)]
    return "\n".join([f"## {title}\n", lines[0], "|---" * len(head) + "|", *lines[1:], ""]) if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
