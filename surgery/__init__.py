"""surgery: model surgery and adapter compression for PEFT.

`import surgery` makes our adapter types known to PEFT, so that `PeftModel.from_pretrained` opens them, whichever of
the two is imported first. It imports neither torch nor peft by itself.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from surgery import errors
    from surgery.checkpoints.adapter import Adapter
    from surgery.comparison import compare
    from surgery.conversion import convert
    from surgery.hub.push import push
    from surgery.initialization import init
    from surgery.inspection import Inspection, inspect
    from surgery.merging import merge
    from surgery.models.base_model import BaseModel
    from surgery.reports.comparison_report import Comparison
    from surgery.reports.merge_report import MergeReport
    from surgery.reports.push_report import PushReport
    from surgery.reports.report import Report
    from surgery.runtime.loading import load
    from surgery.training.preparing import trainable
    from surgery.training.train import train
    from surgery.training.train_report import TrainReport

__all__ = [
    "Adapter",
    "BaseModel",
    "Comparison",
    "Inspection",
    "MergeReport",
    "PushReport",
    "Report",
    "TrainReport",
    "__version__",
    "compare",
    "convert",
    "errors",
    "init",
    "inspect",
    "load",
    "merge",
    "push",
    "train",
    "trainable",
]

__version__ = version("adapter-surgery")

_HOMES = {
    "Adapter": "surgery.checkpoints.adapter",
    "BaseModel": "surgery.models.base_model",
    "Comparison": "surgery.reports.comparison_report",
    "Inspection": "surgery.inspection",
    "MergeReport": "surgery.reports.merge_report",
    "PushReport": "surgery.reports.push_report",
    "Report": "surgery.reports.report",
    "TrainReport": "surgery.training.train_report",
    "compare": "surgery.comparison",
    "convert": "surgery.conversion",
    "errors": "surgery.errors",
    "init": "surgery.initialization",
    "inspect": "surgery.inspection",
    "load": "surgery.runtime.loading",
    "merge": "surgery.merging",
    "push": "surgery.hub.push",
    "train": "surgery.training.train",
    "trainable": "surgery.training.preparing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _peft_imported(peft: Any) -> None:
    from surgery.runtime.registry import register_types

    register_types(peft)


wrapt.register_post_import_hook(_peft_imported, "peft")
