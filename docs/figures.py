"""Draw the pictures of docs/figures.md from what the benchmarks measured.

    python benchmarks/load.py --out docs/figures/load.json && python docs/figures.py

`docs/figures/load.json` has one entry for each scenario, competitor and round.
"""

import json
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SCENARIO = "Weights only, 80 MB/s a connection (as an object store)"
ROW, LEFT, WIDTH = 26, 250, 760  # pixels: height of a bar's row, where bars begin, of the picture


def best(entries: list[dict[str, object]], scenario: str) -> dict[str, float]:
    """Give the best seconds of each competitor in a scenario, in the order of the file."""
    seconds: dict[str, float] = {}
    for entry in entries:
        if entry["scenario"] == scenario:
            name = str(entry["competitor"])
            seconds[name] = min(float(str(entry["seconds"])), seconds.get(name, float("inf")))
    return seconds


def bars(title: str, seconds: dict[str, float]) -> str:
    """Draw horizontal bars of seconds, as SVG that is read on light and dark ground."""
    most = max(seconds.values())
    room = WIDTH - LEFT - 150
    height = ROW * (len(seconds) + 1) + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        '<g font-family="sans-serif" font-size="13" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
        f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    first = next(iter(seconds.values()))
    for row, (name, value) in enumerate(seconds.items(), 1):
        top = ROW * row + 8
        color = "#1a7f5a" if row == 1 else "#8a94a6"
        told = f"{value:.2f} s" + ("" if row == 1 else f", {value / first:.0f} times")
        length = max(2, round(room * value / most))
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top + 2}" width="{length}" height="16" rx="2" fill="{color}"/>',
            f'<text x="{LEFT + length + 6}" y="{top + 14}">{told}</text>',
        ]
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"


def speed() -> str:
    """Draw what README shows."""
    entries = json.loads((DOCS / "figures/load.json").read_text("utf-8"))
    title = "Weights of a 1.66 GB checkpoint, 80 MB/s a connection: seconds"
    return bars(title, best(entries, SCENARIO))


if __name__ == "__main__":
    (DOCS / "images/speed.svg").write_text(speed(), "utf-8")
