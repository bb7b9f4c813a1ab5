"""Results as Markdown tables, for terminals and documents alike."""


def markdown_table(head, rows) -> str:
    """A table of a line of names and lines of cells, all texts."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def records_table(records: list[dict]) -> str:
    """A table of records, a column for each key that any of them has; numbers with four digits."""
    head = list(dict.fromkeys(key for record in records for key in record))
    return markdown_table(head, [[_cell(record.get(key)) for key in head] for record in records])


def _cell(value):
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
