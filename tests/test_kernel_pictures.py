"""docs/kernels.md shows the layouts and the instructions as they are."""

import pytest

from tools.kernel_pictures import DRAWINGS, PAGE, PICTURES, int4_places, page

MEND = "python -m tools.kernel_pictures"


@pytest.mark.parametrize("name", DRAWINGS)
def test_pictures_are_drawn_from_the_code(name: str) -> None:
    assert (PICTURES / f"{name}.svg").read_text() == str(DRAWINGS[name]()), MEND


def test_the_page_has_its_pictures_and_its_table() -> None:
    text = PAGE.read_text()
    assert all(f"(pictures/{name}.svg)" in text for name in DRAWINGS)
    assert text == page(), MEND


def test_int4_words_hold_what_the_docstring_says() -> None:
    """q[32w + 16s + 8h + 2l + p] is nibble 4p + 2s + h of word 4w + l."""
    for k, (word, nibble) in int4_places().items():
        s, h, lane, p = k // 16, k // 8 % 2, k // 2 % 4, k % 2
        assert (word, nibble) == (lane, 4 * p + 2 * s + h), k
