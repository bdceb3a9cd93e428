"""Draw the README's picture, the pipeline and Figure 2's transfer: python -m results.pipeline

The blocks and arrows are those that the code uses (`DEPTHS`, `source_block`), so that the picture
cannot say something else. Writes pipeline.svg beside this file; no package is needed to draw.
"""
from pathlib import Path

from train_teacher import DEPTHS
from transfer_init import source_block

WIDTH, HEIGHT = 960, 430  # pixels
# dark enough for small text on the white card
INK, FAINT, TEACHER, STUDENT = "#1f2328", "#8c959f", "#b35900", "#0b6bcb"
SCRIPTS = (  # name, what it does, the file it writes
    ("train_teacher.py", "a ResNet with ReLU", "r34.pt"),
    ("transfer_init.py", "its weights, with LIF", "snn_init.pt"),
    ("train_idsnn.py", "surrogate gradients", "idsnn.pt"),
    ("eval.py", "accuracy, firing, energy", ""),
)


# ---- what an SVG is made of: strings; x and y in pixels from the upper left corner

def text(x, y, content, size=13, color=INK, weight="normal", mono=False):
    # fonts that are there on every system: an image on a page loads none
    family = "ui-monospace, Menlo, Consolas, monospace" if mono else "Helvetica, Arial, sans-serif"
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" font-weight="{weight}" '
            f'font-family="{family}" text-anchor="middle">{content}</text>')


def box(x, y, w, h, color, fill="#ffffff"):
    return (f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{fill}" '
            f'stroke="{color}" stroke-width="1.5"/>')


def arrow(path, color=INK, head="ink"):
    return (f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.5" '
            f'marker-end="url(#{head})"/>')


def arrow_head(name, color):
    return (f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>')


# ---- the two halves of the picture

def pipeline():
    """The four scripts in a row, the files between them, and the teacher that stage 3 asks."""
    # edge, distance and width of the boxes; their top and height
    left, step, w, y, h = 28, 247, 163, 62, 54
    for i, (script, what, file) in enumerate(SCRIPTS):
        x = left + i * step
        yield box(x, y, w, h, INK)
        yield text(x + w / 2, y + 23, script, 14, weight="bold", mono=True)
        yield text(x + w / 2, y + 42, what, 12)
        if file:
            yield arrow(f"M{x + w} {y + h / 2} H{x + step}")
            yield text(x + (w + step) / 2, y + h / 2 - 8, file, 10.5, mono=True)
    # from the file r34.pt to the script train_idsnn.py, above the row
    start, end = left + (w + step) / 2, left + 2 * step + w / 2
    yield arrow(f"M{start} {y + 8} C{start} {y - 40} {end} {y - 40} {end} {y - 2}",
                TEACHER, "teacher")
    told = "teaches: the softened class scores, eq. 6 to 8"
    yield text((start + end) / 2, y - 36, told, 12, TEACHER)


def blocks(depth, y, color, wide):
    """Places (center x of each block, stage by stage) and drawing of a ResNet's blocks in a row."""
    places, drawing, w = [], [], 30
    for stage, count in enumerate(DEPTHS[depth][1]):
        # its blocks stand around the middle of its own share of the width
        middle = 214 + sum(wide[:stage]) + wide[stage] / 2
        row = [middle + (j - (count - 1) / 2) * (w + 6) for j in range(count)]
        places.append(row)
        for j, x in enumerate(row):
            drawing += [box(x - w / 2, y, w, 34, color), text(x, y + 22, j, 12, color)]
    return places, drawing


def transfer(y=188, gap=104):
    """Figure 2b: which block of the teacher fills which of the student, in each stage."""
    # the teacher has more blocks in every stage: its stages say how wide the columns are
    wide = [36 * count + 26 for count in DEPTHS[34][1]]
    sources, drawing = blocks(34, y, TEACHER, wide)
    targets, more = blocks(18, y + gap, STUDENT, wide)
    yield from drawing + more
    for stage, (row, filled) in enumerate(zip(sources, targets)):
        yield text((row[0] + row[-1]) / 2, y - 9, f"layer{stage + 1}", 12, FAINT, mono=True)
        for j, x in enumerate(filled):
            k = source_block(j, len(filled), len(row), "spread")
            yield arrow(f"M{row[k]} {y + 36} L{x} {y + gap - 3}", INK)
    # stem and classifier, left and right of the stages
    stem, end = 186, 214 + sum(wide) + 24
    # the classifier has no arrow: it stays fresh
    for at, color in ((y, TEACHER), (y + gap, STUDENT)):
        yield box(stem - 24, at, 48, 34, color)
        yield text(stem, at + 22, "conv1", 12, color, mono=True)
        yield box(end - 18, at, 36, 34, color)
        yield text(end, at + 22, "fc", 12, color, mono=True)
    yield arrow(f"M{stem} {y + 36} V{y + gap - 3}")
    yield text(end, y + gap - 10, "fresh", 12, FAINT)
    yield text(82, y + 15, "ResNet-34", 14, TEACHER, "bold")
    yield text(82, y + 32, "conv, BN, ReLU", 12, TEACHER)
    yield text(82, y + gap + 15, "Spiking ResNet-18", 14, STUDENT, "bold")
    yield text(82, y + gap + 32, "conv, BN, LIF", 12, STUDENT)
    # what an arrow and a neuron do
    captions = (
        "an arrow copies a block's convolutions and batch norms, "
        "looped where channel counts differ:",
        "target[i, j] = source[i mod C_out, j mod C_in]",
        "LIF, at each of T steps: U[t] = decay * U[t-1] * (1 - F[t-1]) + X[t], "
        "F[t] = 1 where U[t] &gt; V_th, else 0",
    )
    for i, line in enumerate(captions):
        yield text(WIDTH / 2, y + gap + 70 + 22 * i, line, 12.5, mono=i == 1)


def main():
    # a card of its own colour: as readable on a dark page as on a white one
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>Four scripts and the files between them; how a ResNet-34 fills a Spiking ResNet-18"
        "</title>",
        "<defs>", arrow_head("ink", INK), arrow_head("teacher", TEACHER), "</defs>",
        box(1, 1, WIDTH - 2, HEIGHT - 2, "#d0d7de"),
        *pipeline(), *transfer(), "</svg>"]
    Path(__file__).with_suffix(".svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
