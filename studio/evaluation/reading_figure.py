"""The rows of `bench_reading` for people: a chart and a table."""

from studio.evaluation.bench_reading import PHASES
from studio.evaluation.chart import Series, chart
from studio.evaluation.tables import markdown_table


def reading_chart(rows: list[dict]) -> str:
    """Exact answers over kept tokens, as SVG: a line for each method, which ends at the whole picture."""
    whole = rows[0]
    series = [Series("all tokens", (_point(whole),))]
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        own = sorted(_point(row) for row in rows if row["method"] == method)
        series.append(Series(method, (*own, _point(whole))))
    title = "Exact answers about unseen scenes"
    return chart(title, "visual tokens that are read", "exact answers (%)", series, log_x=True)


def reading_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    head = ("Method", "Keep", "Tokens", *(f"{phase.capitalize()} ms" for phase in PHASES), "Speed-up", "Cache KiB")
    head += ("Exact %", "Note")
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['keep']:g}", f"{row['kept_tokens']} of {row['visual_tokens']}"]
        cells += [f"{1000 * row[phase]:.1f}" for phase in PHASES]
        cells += [f"{row['speedup']:.2f}", f"{row['cache_bytes'] / 1024:.0f}", f"{100 * row['accuracy']:.1f}"]
        lines.append([*cells, _note(row)])
    return markdown_table(head, lines)


def _point(row):
    return row["kept_tokens"], 100 * row["accuracy"]


def _note(row):
    notes = [] if row["faster"] or row["method"] == "none" else ["not faster"]
    notes += ["not better than random"] if row["better_than_random"] is False else []
    return ", ".join(notes)
