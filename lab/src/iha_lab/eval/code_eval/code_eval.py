"""The metric that the harness's code tasks load by the name "code_eval": programs in our sandbox.

`evaluate.load` takes a local folder of that name before it asks the hub.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from iha_lab.eval import sandbox


class CodeEval(evaluate.Metric):
    """pass@k of programs (`predictions`, a list for each problem) under tests (`references`)."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="", inputs_description="", features=features
        )

    def compute(self, **given: Any) -> Any:
        """Of `evaluate`'s own metric of that name, without a copy of everything on disk."""
        return sandbox.code_eval_compute(given["predictions"], given["references"], given["k"])
