from __future__ import annotations

import xml.etree.ElementTree as ET

from iha_lab.report import visibility
from iha_lab.report.tables import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_in_the_docs_is_the_operators_rule() -> None:
    text = visibility.picture()
    assert (ROOT / "docs" / "images" / "visibility.svg").read_text() == text
    cells = [r.get("fill") for r in ET.fromstring(text).iter(f"{SVG}rect")][1:]
    seen = [fill in visibility.COLOURS for fill in cells]
    size = visibility.N * visibility.P
    flat, token, window = (seen[i : i + size**2] for i in range(0, 3 * size**2, size**2))
    assert sum(flat) == size * (size + 1) // 2
    assert sum(token) == visibility.P**2 * visibility.N * (visibility.N + 1) // 2
    assert [sum(window[i : i + size]) for i in range(0, size**2, size)] == [
        min(i + 1, 2 * visibility.P) for i in range(size)
    ]
