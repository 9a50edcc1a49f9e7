"""The pictures and the table of docs/kernels.md, from the code that they show.

    python -m tools.kernel_pictures

Which value lies where in a word is found by packing; instructions come from
kernels/gpu/instructions.json.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.gpu.w4a16_pack import pack_w4a16
from kernels.kv_layout import k_words

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
PICTURES = ROOT / "docs" / "pictures"
TABLE = ROOT / "kernels" / "gpu" / "instructions.json"
MARKS = "<!-- from instructions.json -->\n", "<!-- end -->\n"

LANES = ("#9ecae1", "#a1d99b", "#fdd0a2", "#dadaeb")
GREY, DARK = "#eeeeee", "#333333"

# An H200: lanes times clock over read bandwidth (its copy bandwidth, measured) per byte.
LANES_PER_S = 132 * 128 * 1.98e9
BYTES_PER_S = 4.3e12
# Forms in the table: what a job's name matches, what it is, bytes per element (None: matrix-bound).
FORMS: tuple[tuple[str, str, float | None], ...] = (
    (r"^w4a16: (w4a16 )?M4 .* bfloat16 K4096 g128 zeros split$", "int4 linear, M ≤ 4", 0.516),
    (r"^w4a16: (w4a16 )?M16 .* bfloat16 K4096 g128 zeros split$", "int4 linear, M ≤ 16", 0.516),
    (r"^w4a16: (w4a16 )?M32 .* bfloat16 K4096 g128 zeros split$", "int4 linear, M ≤ 32", 0.516),
    (r"^w4a16: (w4a16 )?M64 \d.* bfloat16 K4096 g128 zeros split$", "int4 linear, M ≤ 64", 0.516),
    (r"^w4a16: (w4a16 )?M128 \d.* bfloat16 K4096 g128 zeros split$", "int4 linear, M ≤ 128", 0.516),
    (r"^w4a16: (w4a16 )?M16 .* g128 zeros gated$", "gate and up with SiLU, M ≤ 16", 0.516),
    (r"^decode_attention: bfloat16 bf16 D128 G4 block 64 tile \S+ w\d s\d$",
     "decode attention, bf16", 2.0),
    (r"^decode_attention: bfloat16 int8 D128 G4 block 64 tile \S+ w\d s\d$",
     "decode attention, int8", 1.031),
    (r"^decode_attention: bfloat16 fp8 D128 G4 block 64 tile \S+ w\d s\d$",
     "decode attention, fp8", 1.031),
    (r"^decode_attention: bfloat16 int4 D128 G4 block 64 tile \S+ w\d s\d$",
     "decode attention, int4", 0.531),
    (r"^prefill_attention: bfloat16 plain D128 G4 block 64 tile 128x64 w\d$",
     "prompt attention, bf16", None),
    (r"^prefill_attention: bfloat16 int8 D128 G4 block 64 tile 128x64 w\d$",
     "prompt attention, int8", None),
)  # fmt: skip


class Svg:
    """Shapes in a coordinate system of pixels, as text."""

    def __init__(self, width: int, height: int) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = GREY) -> None:
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{DARK}"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4, text)

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self._lines.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self._lines.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{DARK}" '
            'marker-end="url(#head)"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self._lines, "</svg>", ""])


def int4_places() -> dict[int, tuple[int, int]]:
    """Input 0 … 31 -> (word of its row, nibble), by packing a weight with only it."""
    places = {}
    for k in range(32):
        q = torch.zeros(64, 64, dtype=torch.uint8)
        q[k, 0] = 15
        ones = torch.ones(1, 64)
        words = pack_w4a16(q, 8 * ones.to(torch.uint8), ones, torch.float32, "cpu").words
        row = words.reshape(-1, 64, 8)[0, 0].tolist()
        (word,) = [i for i, value in enumerate(row) if value]
        bits = row[word] & 0xFFFFFFFF
        places[k] = word, (bits & -bits).bit_length() // 4
    return places


def int4_words() -> Svg:
    svg, places = Svg(880, 190), int4_places()
    svg.text(
        10, 20, "32 inputs k of one output; colour: the word, and the lane that loads it", "start"
    )
    for k, (word, _) in places.items():
        svg.box(10 + 27 * k, 30, 27, 26, str(k), LANES[word])
    svg.text(10, 90, "the words, from bit 31 down to bit 0; a cell of 4 bits shows its k", "start")
    for word in range(4):
        nibbles = {nibble: k for k, (w, nibble) in places.items() if w == word}
        x = 10 + 217 * word
        for nibble in range(8):
            svg.box(x + 26 * (7 - nibble), 100, 26, 26, str(nibbles[nibble]), LANES[word])
        svg.text(x + 104, 145, f"word {word}")
    says = "Shifted by 0, 4, 8, 12 and masked with 0x000f000f, a word gives four pairs of inputs"
    svg.text(10, 175, f"{says}: the operand's registers.", "start")
    return svg


def kv_words() -> Svg:
    svg = Svg(880, 190)
    words = k_words(torch.arange(16, dtype=torch.uint8).view(1, 16)).view(torch.uint8).view(4, 4)
    word_of = {f: i for i, row in enumerate(words.tolist()) for f in row}
    svg.text(10, 20, "A run of 16: a key's features, or a value's tokens", "start")
    for feature, word in sorted(word_of.items()):
        svg.box(10 + 40 * feature, 30, 40, 26, str(feature), LANES[word])
    svg.text(10, 90, "its four words, byte 0 first", "start")
    for word, row in enumerate(words.tolist()):
        for byte, feature in enumerate(row):
            svg.box(10 + 170 * word + 40 * byte, 100, 40, 26, str(feature), LANES[word])
        svg.text(90 + 170 * word, 145, f"word {word}")
    says = "8-bit values: a byte each. 4-bit values: features d and d + F share a byte"
    svg.text(10, 175, f"{says}. Scale and zero of a token and head: one word beside.", "start")
    return svg


def split_k() -> Svg:
    svg = Svg(880, 200)
    svg.text(110, 20, "weight [N, K], three parts along K")
    for n in range(3):
        for part in range(3):
            svg.box(20 + 60 * part, 30 + 40 * n, 60, 40, f"{n}, {part}", LANES[part])
    svg.text(110, 175, "9 programs instead of 3")
    for part in range(3):
        svg.box(330 + 14 * part, 46 + 18 * part, 120, 70, "" if part < 2 else "[M, N]", LANES[part])
    svg.text(410, 175, "float32 [3, M, N]")
    svg.arrow(210, 90, 320, 90)
    svg.arrow(490, 90, 570, 90)
    svg.box(580, 55, 280, 70, "sum of parts + bias, then its own work")
    svg.text(720, 150, "the next kernel: add + RMSNorm,")
    svg.text(720, 166, "rotation + store, or SiLU")
    return svg


def split_kv() -> Svg:
    svg = Svg(880, 190)
    svg.text(10, 20, "one sequence's keys and values of one head, in blocks of 64 tokens", "start")
    for block in range(12):
        svg.box(10 + 40 * block, 30, 40, 26, str(block), LANES[block // 4])
    for split in range(3):
        x = 10 + 160 * split
        svg.arrow(x + 80, 58, x + 80, 82)
        svg.box(x + 10, 85, 140, 40, "G queries, 256 keys", LANES[split])
        svg.text(x + 80, 143, "sum, its scale")
    svg.arrow(485, 105, 560, 105)
    svg.box(570, 80, 220, 50, "merge: softmax over splits")
    says = "A program per sequence, KV head and split. Splits follow from host integers"
    svg.text(10, 175, f"{says}, so that a graph serves every length.", "start")
    return svg


def one_ahead() -> Svg:
    svg = Svg(880, 210)
    for row, name in enumerate(("host", "GPU", "copy")):
        svg.text(10, 50 + 50 * row, name, "start")
    for step in range(4):
        start, fill = 140 + 188 * step, LANES[step]
        if step < 3:
            svg.box(start, 80, 185, 30, f"step {step}", fill)
            svg.box(start + 185, 130, 50, 30, "tokens", fill)
        launched = 70 + 66 * step if step < 2 else start - 76
        svg.box(launched, 30, 62, 30, f"launch {step}", fill)
        if step >= 2:
            svg.box(launched - 62, 30, 60, 30, f"update {step - 2}", LANES[step - 2])
    svg.arrow(132, 60, 140, 78)
    svg.arrow(198, 60, 328, 78)
    svg.arrow(502, 60, 516, 78)
    says = "Step 1 reads the tokens of step 0 on the GPU; the host learns them while step 1 runs"
    svg.text(10, 190, f"{says}. A sequence that ended costs one row.", "start")
    return svg


def instruction_table() -> str:
    """Rows by form; columns by version of Triton, for sm_90."""
    content = json.loads(TABLE.read_text())
    versions = sorted(content)
    lines = [
        "| main loop on sm_90 | budget | "
        + " | ".join(f"Triton {v}: instructions, registers, shared" for v in versions)
        + " |",
        "|---|---|" + "---|" * len(versions),
    ]
    for pattern, what, num_bytes in FORMS:
        budget = f"{LANES_PER_S / BYTES_PER_S * num_bytes:.1f}" if num_bytes else "–"  # noqa: RUF001
        cells = []
        for version in versions:
            found = [r for name, r in content[version]["90"].items() if re.search(pattern, name)]
            assert len(found) == 1, f"{pattern} is {len(found)} jobs of Triton {version}"
            row = found[0]
            cells.append(
                f"{row['per_element']:.1f}, {row['registers']}, {row['shared'] / 1024:.0f} KiB"
            )
        lines.append(f"| {what} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


DRAWINGS: dict[str, Callable[[], Svg]] = {
    "int4_words": int4_words,
    "kv_words": kv_words,
    "split_k": split_k,
    "split_kv": split_kv,
    "one_ahead": one_ahead,
}


def page() -> str:
    """docs/kernels.md with the table as it should be."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + instruction_table() + MARKS[1] + rest.split(MARKS[1])[1]


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (PICTURES / f"{name}.svg").write_text(str(draw()))
    PAGE.write_text(page())
    print(f"{len(DRAWINGS)} pictures in {PICTURES.relative_to(ROOT)}, table in docs/kernels.md")


if __name__ == "__main__":
    main()
