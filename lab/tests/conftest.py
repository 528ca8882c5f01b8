"""Shapes in annotations are checked while the tests run: jaxtyping's, by beartype."""

from __future__ import annotations

from jaxtyping import install_import_hook

# For as long as the tests run; before any test module imports the packages.
install_import_hook(["iha_lab.baselines", "iha_lab.theory"], "beartype.beartype")
