"""The drawings of the documents: `python docs/drawings/draw.py` writes the SVG files beside it.

With cairosvg installed it writes overview.png too, which the package index shows.
"""

from __future__ import annotations

import html
from pathlib import Path

FOLDER = Path(__file__).parent
INK, SOFT, LINE = "#1f2937", "#6b7280", "#9ca3af"
POLICY, REFERENCE, GOOD, BAD, PROMPT = "#4f46e5", "#d97706", "#059669", "#dc2626", "#64748b"
FILLS = {
    POLICY: "#e0e7ff",
    REFERENCE: "#fef3c7",
    GOOD: "#d1fae5",
    BAD: "#fee2e2",
    PROMPT: "#e2e8f0",
}


class Drawing:
    """Shapes on a white sheet; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, colour: str, *lines: str) -> None:
        """A rectangle with lines of text in its middle, the first one bold."""
        fill = FILLS.get(colour, "#f9fafb")
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{colour}"'
            ' stroke-width="1.5"/>'
        )
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 18 * i, line, bold=not i, anchor="middle")

    def text(
        self, x: float, y: float, text: str, *, bold: bool = False, colour: str = INK,
        anchor: str = "start", size: int = 14,
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
            f"{weight}>{html.escape(text)}</text>"
        )

    def path(self, points: list[tuple[float, float]], colour: str, **style: object) -> None:
        """A line through points; `arrow=True` puts a head on its end, `dash=True` breaks it."""
        d = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(points))
        dash = ' stroke-dasharray="5 4"' if style.get("dash") else ""
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{style.get("width", 2)}"'
            f'{dash} stroke-linejoin="round"/>'
        )
        if style.get("arrow"):
            (ax, ay), (bx, by) = points[-2:]
            length = ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5
            ux, uy = (bx - ax) / length, (by - ay) / length
            wings = [(bx - 9 * ux + s * 5 * uy, by - 9 * uy - s * 5 * ux) for s in (1, -1)]
            head = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(bx, by), *wings])
            self.parts.append(f'<polygon points="{head}" fill="{colour}"/>')

    def frame(self, x: float, y: float, w: float, h: float, dash: bool = False) -> None:
        broken = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="none" stroke="{LINE}"'
            f"{broken}/>"
        )

    def cell(self, x: float, y: float, size: float, colour: str | None) -> None:
        fill = FILLS[colour] if colour else "#ffffff"
        stroke = colour or "#e5e7eb"
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="2" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def svg(self) -> str:
        width, height = self.size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img"'
            ' font-family="Helvetica, Arial, sans-serif">'
            f"<title>{html.escape(self.title)}</title>"
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(self.parts)}</svg>\n'
        )


def overview() -> Drawing:
    """What a step of training is, for who has never heard of it."""
    d = Drawing(860, 300, "A pair, a model and its reference; the reference moves")
    d.text(20, 30, "A preference pair", bold=True)
    d.box(20, 44, 190, 40, PROMPT, "prompt")
    d.box(20, 92, 190, 40, GOOD, "chosen answer")
    d.box(20, 140, 190, 40, BAD, "rejected answer")
    d.box(320, 44, 190, 54, POLICY, "model", "is trained")
    d.box(320, 140, 190, 54, REFERENCE, "reference", "where the model was")
    d.path([(210, 96), (262, 96), (262, 71), (318, 71)], LINE, arrow=True)
    d.path([(262, 96), (262, 167), (318, 167)], LINE, arrow=True)
    d.box(630, 76, 210, 86, SOFT, "loss", "chosen up, rejected down,", "not far from the reference")
    d.path([(510, 71), (570, 71), (570, 104), (628, 104)], LINE, arrow=True)
    d.path([(510, 167), (570, 167), (570, 134), (628, 134)], LINE, arrow=True)
    d.path([(415, 98), (415, 138)], REFERENCE, arrow=True)
    d.text(426, 123, "every τ steps", colour=REFERENCE, size=13)
    d.text(20, 236, "reference ← α · model + (1 − α) · reference", bold=True, colour=REFERENCE)
    schedules = "α = 0: it never moves (DPO, IPO, KTO). α > 0: it follows (TR-DPO, TR-IPO, TR-KTO)."
    d.text(20, 260, schedules, size=13)
    usual = "Other trainers hold the reference as a second model on the GPU."
    usual += " Most schedules here do not."
    d.text(20, 282, usual, size=13, colour=SOFT)
    return d


def reference() -> Drawing:
    """The three schedules against a policy that moves away from its start."""
    d = Drawing(860, 250, "A frozen, a soft and a hard reference behind a policy")
    n, tau, width = 16, 4, 250
    policy = [1 - 2.718 ** (-i / 9) for i in range(n + 1)]
    for k, (name, alpha, what) in enumerate(
        [("frozen", 0.0, "α = 0"), ("soft", 0.5, "α = 0.5, τ = 4"), ("hard", 1.0, "α = 1, τ = 4")]
    ):
        x0, y0, step = 25 + k * 280, 200, width / n
        d.text(x0, 28, name, bold=True)
        d.text(x0 + 60, 28, what, colour=SOFT)
        d.path([(x0, 45), (x0, y0), (x0 + width, y0)], LINE, width=1)
        d.path([(x0 + i * step, y0 - 150 * p) for i, p in enumerate(policy)], POLICY)
        ref, points = 0.0, [(float(x0), float(y0))]
        for i in range(1, n + 1):
            points.append((x0 + i * step, y0 - 150 * ref))
            if i % tau == 0:
                ref += alpha * (policy[i] - ref)
                points.append((x0 + i * step, y0 - 150 * ref))
        d.path(points, REFERENCE, dash=True)
    d.text(25, 226, "optimizer steps →", colour=SOFT, size=12)
    d.text(560, 234, "— policy", colour=POLICY, bold=True)
    d.text(660, 234, "- - reference", colour=REFERENCE, bold=True)
    d.text(25, 242, "height: distance of the weights from the start", colour=SOFT, size=12)
    return d


def window() -> Drawing:
    """Two windows of a hard schedule: scores first, then steps."""
    d = Drawing(860, 220, "Two windows of four steps")
    d.text(20, 28, "τ = 4, hard updates", bold=True)
    for w in range(2):
        x = 20 + w * 415
        d.box(x, 56, 96, 60, REFERENCE, "score", "4 batches")
        for i in range(4):
            d.box(x + 106 + i * 72, 56, 64, 60, POLICY, f"step {w * 4 + i + 1}")
        d.path([(x, 134), (x, 142), (x + 386, 142), (x + 386, 134)], LINE, width=1)
        d.text(x + 193, 160, f"window {w + 1}", anchor="middle", colour=SOFT)
    d.path([(429, 176), (429, 120)], REFERENCE, arrow=True)
    d.text(
        429, 192, "the reference moves: it is the policy again", colour=REFERENCE, anchor="middle"
    )
    kept = "While the policy is the reference, it scores the batches to come."
    d.text(20, 212, f"{kept} One number a completion is kept.", colour=SOFT, size=13)
    return d


def place() -> Drawing:
    """What lies where, for each place of the reference."""
    d = Drawing(860, 270, "Where the weights of the reference lie")
    rows = (
        ("snapshot", "hard updates", None, "scores only"),
        ("offloaded", "soft updates, τ > 1", None, "reference"),
        ("adapter", "LoRA, any schedule", "past factors", None),
        ("resident", "soft updates, τ = 1", "reference", None),
    )
    d.text(20, 70, "GPU", bold=True)
    d.text(20, 196, "host", bold=True)
    for i, (name, when, device, host) in enumerate(rows):
        x = 90 + i * 192
        d.text(x, 26, name, bold=True)
        d.text(x, 43, when, colour=SOFT, size=12)
        d.frame(x - 8, 52, 182, 108)
        d.frame(x - 8, 172, 182, 58, dash=True)
        d.box(x, 60, 166, 42, POLICY, "policy" if name != "adapter" else "base + factors")
        for y, held in ((110, device), (180, host)):
            if held:
                d.box(x, y, 166, 42 if held == "reference" else 24, REFERENCE, held)
    turns = (
        "An offloaded reference changes places with the policy for as long as it scores a window."
    )
    d.text(20, 256, turns, colour=SOFT, size=13)
    return d


def packed_row() -> Drawing:
    """Two pairs, padded as usual and packed."""
    d = Drawing(860, 250, "A padded batch and a packed row of the same two pairs")
    size = 18
    pairs = [(6, 4, 3), (3, 5, 4)]
    longest = max(p + max(c, r) for p, c, r in pairs)
    places = 4 * longest
    tokens = sum(p + c + r for p, c, r in pairs)
    d.text(20, 26, f"padded: 4 rows, {places} places", bold=True)
    y = 38
    for p, c, r in pairs:
        for length, colour in ((c, GOOD), (r, BAD)):
            row = [PROMPT] * p + [colour] * length + [None] * (longest - p - length)
            for i, kind in enumerate(row):
                d.cell(20 + i * size, y, size, kind)
            y += size + 3
    d.text(20, 160, f"packed: one row, {tokens} places", bold=True)
    x = 20
    for k, (p, c, r) in enumerate(pairs):
        start = x
        for kind in [PROMPT] * p + [GOOD] * c + [BAD] * r:
            d.cell(x, 172, size, kind)
            x += size
        d.text((start + x) / 2, 208, f"pair {k + 1}", anchor="middle", colour=SOFT, size=12)
        x += 6
    legend = ((PROMPT, "prompt"), (GOOD, "chosen"), (BAD, "rejected"), (None, "padding"))
    for i, (colour, name) in enumerate(legend):
        d.cell(420 + i * 105, 38, size, colour)
        d.text(444 + i * 105, 51, name, size=13)
    d.text(
        420, 88, "Each place is computed by every layer, prompts of a pair", size=13, colour=SOFT
    )
    d.text(420, 106, "twice where they are padded.", size=13, colour=SOFT)
    d.text(
        20,
        236,
        "Only what scores completions, green and red, passes the LM head.",
        size=13,
        colour=SOFT,
    )
    return d


def prefix_sharing() -> Drawing:
    """Which token sees which in a packed pair."""
    d = Drawing(860, 330, "Which token of a packed pair attends to which")
    kinds = [PROMPT] * 5 + [GOOD] * 4 + [BAD] * 3
    size, x0, y0 = 20, 90, 50
    for i, kind in enumerate(kinds):
        d.cell(x0 + i * size, y0 - size - 4, size, kind)
        d.cell(x0 - size - 4, y0 + i * size, size, kind)
        for j, other in enumerate(kinds):
            seen = j <= i and not (kind == BAD and other == GOOD)
            d.cell(x0 + j * size, y0 + i * size, size, kind if seen else None)
    d.text(x0, 18, "is looked at →", size=12, colour=SOFT)
    d.text(8, y0 + 130, "looks", size=12, colour=SOFT)
    tall = y0 + len(kinds) * size
    d.text(x0, tall + 22, "positions", size=12, colour=SOFT)
    for i, position in enumerate([*range(9), *range(5, 8)]):
        d.text(x0 + i * size + 9, tall + 38, str(position), anchor="middle", size=11)
    x = 390
    d.cell(x, 56, size, PROMPT)
    d.text(x + 30, 70, "A prompt's token sees the prompt up to itself.")
    d.cell(x, 92, size, GOOD)
    d.text(x + 30, 106, "A chosen token sees the prompt and the chosen up to itself.")
    d.cell(x, 128, size, BAD)
    d.text(x + 30, 142, "A rejected token sees the prompt and the rejected up to itself,")
    d.text(x + 30, 160, "as if the chosen completion were not there.")
    d.text(x, 204, "Positions of the rejected go on after the prompt, too:", colour=SOFT)
    d.text(x, 222, "both completions get the log-probs of separate sequences,", colour=SOFT)
    d.text(x, 240, "and the prompt is computed once.", colour=SOFT)
    return d


DRAWINGS = {
    "overview": overview, "reference": reference, "window": window, "place": place,
    "packed-row": packed_row, "prefix-sharing": prefix_sharing,
}  # fmt: skip


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
    try:
        import cairosvg
    except ImportError:
        return
    png = FOLDER / "overview.png"
    cairosvg.svg2png(url=str(FOLDER / "overview.svg"), write_to=str(png), scale=2)


if __name__ == "__main__":
    main()
