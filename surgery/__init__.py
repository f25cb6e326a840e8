"""surgery: model surgery and adapter compression for PEFT.

`import surgery` makes our adapter types known to PEFT, so that `PeftModel.from_pretrained` opens them, whichever of
the two is imported first. It imports neither torch nor peft by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from surgery.system.import_order import import_peft_first
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery import codec, errors
    from surgery.adapters.adapter import Adapter
    from surgery.blending.blend import blend
    from surgery.blending.report import BlendReport
    from surgery.comparison.compare import compare
    from surgery.comparison.report import Comparison
    from surgery.converters.budget import Budget
    from surgery.converters.convert import convert
    from surgery.converters.report import BatchEntry, BatchReport, ConvertReport
    from surgery.deltas.operators import Delta, LowRank, Sum
    from surgery.errors import (
        AdapterError,
        CheckpointError,
        DataError,
        HubError,
        MethodError,
        NumericsError,
        OptionError,
        OutputError,
        SurgeryError,
        TargetError,
        UnreachableError,
        WrongBaseError,
    )
    from surgery.exporting.export import export
    from surgery.exporting.report import ExportReport
    from surgery.initialization.init import init
    from surgery.initialization.report import Report
    from surgery.inspection.inspect import inspect
    from surgery.inspection.report import Inspection
    from surgery.merging.merge import merge
    from surgery.merging.report import MergeReport
    from surgery.methods.frod import FrodPortableConfig
    from surgery.methods.giva import GivaConfig
    from surgery.methods.inilora import IniloraConfig
    from surgery.methods.smoa import SmoaConfig
    from surgery.models.base_model import BaseModel
    from surgery.passes.data_settings import DataSettings
    from surgery.peft_types.loading import load
    from surgery.publishing.push import push
    from surgery.publishing.report import PushReport
    from surgery.serving.store import Store
    from surgery.training.interruption import TrainingInterrupted
    from surgery.training.preparing import trainable
    from surgery.training.report import TrainReport
    from surgery.training.settings import TrainSettings
    from surgery.training.train import train

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseModel",
    "BatchEntry",
    "BatchReport",
    "BlendReport",
    "Budget",
    "CheckpointError",
    "Comparison",
    "ConvertReport",
    "DataError",
    "DataSettings",
    "Delta",
    "ExportReport",
    "FrodPortableConfig",
    "GivaConfig",
    "HubError",
    "IniloraConfig",
    "Inspection",
    "LowRank",
    "MergeReport",
    "MethodError",
    "NumericsError",
    "OptionError",
    "OutputError",
    "PushReport",
    "Report",
    "SmoaConfig",
    "Store",
    "Sum",
    "SurgeryError",
    "TargetError",
    "TrainReport",
    "TrainSettings",
    "TrainingInterrupted",
    "UnreachableError",
    "WrongBaseError",
    "__version__",
    "blend",
    "codec",
    "compare",
    "convert",
    "errors",
    "export",
    "init",
    "inspect",
    "load",
    "merge",
    "push",
    "train",
    "trainable",
]

_HOMES = {
    "Adapter": "surgery.adapters.adapter",
    "AdapterError": "surgery.errors",
    "BaseModel": "surgery.models.base_model",
    "BatchEntry": "surgery.converters.report",
    "BatchReport": "surgery.converters.report",
    "BlendReport": "surgery.blending.report",
    "Budget": "surgery.converters.budget",
    "CheckpointError": "surgery.errors",
    "Comparison": "surgery.comparison.report",
    "ConvertReport": "surgery.converters.report",
    "DataError": "surgery.errors",
    "DataSettings": "surgery.passes.data_settings",
    "Delta": "surgery.deltas.operators",
    "ExportReport": "surgery.exporting.report",
    "FrodPortableConfig": "surgery.methods.frod",
    "GivaConfig": "surgery.methods.giva",
    "HubError": "surgery.errors",
    "IniloraConfig": "surgery.methods.inilora",
    "Inspection": "surgery.inspection.report",
    "LowRank": "surgery.deltas.operators",
    "MergeReport": "surgery.merging.report",
    "MethodError": "surgery.errors",
    "NumericsError": "surgery.errors",
    "OptionError": "surgery.errors",
    "OutputError": "surgery.errors",
    "PushReport": "surgery.publishing.report",
    "Report": "surgery.initialization.report",
    "Store": "surgery.serving.store",
    "SmoaConfig": "surgery.methods.smoa",
    "Sum": "surgery.deltas.operators",
    "SurgeryError": "surgery.errors",
    "TargetError": "surgery.errors",
    "TrainReport": "surgery.training.report",
    "TrainSettings": "surgery.training.settings",
    "TrainingInterrupted": "surgery.training.interruption",
    "UnreachableError": "surgery.errors",
    "WrongBaseError": "surgery.errors",
    "codec": "surgery.codec",
    "blend": "surgery.blending.blend",
    "compare": "surgery.comparison.compare",
    "convert": "surgery.converters.convert",
    "errors": "surgery.errors",
    "export": "surgery.exporting.export",
    "init": "surgery.initialization.init",
    "inspect": "surgery.inspection.inspect",
    "load": "surgery.peft_types.loading",
    "merge": "surgery.merging.merge",
    "push": "surgery.publishing.push",
    "train": "surgery.training.train",
    "trainable": "surgery.training.preparing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name in {"codec", "errors"} else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _peft_imported(peft: Any) -> None:
    from surgery.peft_types.registry import register_types

    register_types(peft)


def _hotswap_imported(module: Any) -> None:
    from surgery.peft_types.hotswap import enable_hot_swap

    enable_hot_swap(module)


import_peft_first()
wrapt.register_post_import_hook(_peft_imported, "peft")
wrapt.register_post_import_hook(_hotswap_imported, "peft.utils.hotswap")
