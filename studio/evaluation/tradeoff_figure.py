"""The rows of `bench_tradeoff` for people: a chart and a table."""

from studio.evaluation.chart import Series, chart
from studio.evaluation.tables import markdown_table

_EXTRA = {
    "verify_ratio": "Verify",
    "draft_ratio": "Draft",
    "break_even_length": "Break-even",
    "acceptance": "Kept drafts",
    "latent_distance": "Latents off by",
}
"""What only some rows have, and what it is called; a column is left out where no row has it."""
_FINE = ("latent_distance",)


def tradeoff_chart(rows: list[dict], batch: int = 1) -> str:
    """Judge's top-1 over pictures a second, as SVG; one series a decoding, of the rows with one batch size."""
    chosen = [row for row in rows if row["batch"] == batch]
    names = list(dict.fromkeys(row["decoding"] for row in chosen))
    series = []
    for name in names:
        own = [row for row in chosen if row["decoding"] == name]
        points = tuple((1 / row["seconds_per_image"], 100 * row["judge_top1"]) for row in own)
        series.append(Series(name, points, tuple(_setting(row) for row in own)))
    title = f"Quality over speed, {batch} at a time"
    return chart(title, "pictures a second", "judge top-1 (%)", series, log_x=True, least_height=10)


def tradeoff_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    head = ("Decoding", "Settings", "Batch", "s a picture", "Speed-up", "Calls", "Accepted", "Top-1 %", "Fréchet")
    extra = {name: label for name, label in _EXTRA.items() if any(name in row for row in rows)}
    head += tuple(extra.values())
    lines = []
    for row in rows:
        cells = [row["decoding"], _setting(row) or "–", str(row["batch"]), f"{row['seconds_per_image']:.3f}"]
        cells += [f"{row['speedup']:.2f}", f"{row['target_calls']:.1f}", f"{row['mean_accepted_length']:.2f}"]
        cells += [f"{100 * row['judge_top1']:.1f}", f"{row['frechet']:.1f}"]
        cells += [f"{row[name]:.{2 + (name in _FINE)}f}" if name in row else "–" for name in extra]
        lines.append(cells)
    return markdown_table(head, lines)


def _setting(row):
    short = {"delta": "δ", "ratio": "ratio", "steps": "steps", "teacher_steps": "teacher", "prefill": "prefill"}
    short |= {"draft_steps": "drafts", "inner_temperature": "inner T"}
    settings = {short[name]: value for name, value in row["settings"].items() if name in short and value}
    parts = [f"{name} {value:g}" for name, value in settings.items()]
    if mode := row["settings"].get("mode"):
        parts.append(f"{mode} (approximate)" if row.get("approximate") else mode)
    return " ".join(parts)
