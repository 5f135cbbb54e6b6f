"""Tables in Markdown."""


def cell(value: object) -> str:
    """One value of a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [header, *[[cell(value) for value in row] for row in rows]]
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|---" * len(header) + "|")
    return "\n".join(text)
