"""Every annotation of the library says what really comes and goes."""

from __future__ import annotations

from tests.test_import import in_a_new_interpreter


def test_annotations_hold() -> None:
    in_a_new_interpreter("import runpy; runpy.run_module('tests.shapes', run_name='__main__')")
