"""The figure of `studio bench rate-distortion`."""

from studio.evaluation.bench_rate_distortion import COUNTED
from studio.evaluation.chart import Series, chart


def rate_distortion_chart(rows: list[dict], measure: str = "psnr") -> str:
    """Mean PSNR, or the judge's distance (`"frechet"`), over mean bytes, as an SVG document.

    A line for each codec and way of counting.
    """
    series = []
    for counted in COUNTED:
        for codec in dict.fromkeys(row["codec"] for row in rows):
            some = [row for row in rows if (row["codec"], row["counted"]) == (codec, counted)]
            points = tuple(sorted((row["bytes"], row[measure]) for row in some))
            if points:
                name = codec.removeprefix("one-d-piece ")
                series.append(Series(name if counted == "file" else f"{name} payload", points))
    quality = "PSNR in dB" if measure == "psnr" else "distance of the judge's features"
    return chart("Held-out pictures from few bytes", "bytes a picture", quality, series, log_x=True)
