"""The pytest plugin under which PEFT's tests run on our types: `-p tests.peft_suite.plugin`.

It changes nothing of the tests: it replaces the rows of their tables, answers what they ask the Hub for from a local
cache, and writes down what came of every test.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from surgery.linalg.low_rank import TruncatedSVD
from surgery.linalg.seeded import generator_for, normal
from surgery.methods.base import Role
from surgery.methods.giva import GradientSource
from surgery.peft_types.attachment import Attachment
from surgery.peft_types.tuner import AdapterModel, attachment_of
from tests.peft_suite.models import SIMILAR
from tests.peft_suite.tables import OURS, rows, type_of

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
outcomes: dict[str, dict[str, Any]] = {}


class _Everything(dict[str, int]):
    """PEFT's tests ask the network for a model that they have not asked for before: all models are here."""

    def __contains__(self, _key: object) -> bool:
        return True

    def __missing__(self, _key: str) -> int:
        return 0


def pytest_configure() -> None:
    """Stand in for diffusers, which the tests import for one test of theirs, and patch our types' starts."""
    if "diffusers" not in sys.modules:
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub
    AdapterModel.inject_adapter = _with_untrained_start(AdapterModel.inject_adapter)  # type: ignore[method-assign]
    Attachment.start = _with_gradients(Attachment.start)  # type: ignore[method-assign]


def _with_untrained_start(inject: Any) -> Any:
    """PEFT's tests mean by `init_weights=False` an adapter that changes the model, as training would."""

    @functools.wraps(inject)
    def injected(self: AdapterModel, model: torch.nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        inject(self, model, adapter_name, *args, **kwargs)
        attachment = attachment_of(model, adapter_name)
        config: Any = self.peft_config[adapter_name]
        if attachment is None or config.init_weights:
            return
        if any(p.is_meta for layer in attachment.layers.values() for p in layer.parameters()):
            return
        known = config.base_fingerprint
        attachment.start()
        config.base_fingerprint = known or config.base_fingerprint
        trained = attachment.method.names(Role.TRAINABLE)
        with torch.no_grad():
            for layer in attachment.layers.values():
                for name, tensor in layer.stored(adapter_name).items():
                    if name in trained:
                        tensor.add_(0.2 * torch.randn_like(tensor))
        attachment.invalidate()

    return injected


def _with_gradients(start: Any) -> Any:
    """GiVA starts from the gradients of a loss: here from random ones, the same for a layer each time."""

    @functools.wraps(start)
    def started(self: Attachment) -> None:
        if self.method.info.name != "giva":
            start(self)
            return
        sites = list(self.layers)
        rank, heights = self.method.gradient_parts(self.config, sites)
        svds = {}
        for site in sites:
            whole = normal((site.out_features, site.in_features), 1.0, generator_for(0, site.key))
            parts = [torch.linalg.svd(part, full_matrices=False) for part in whole.split(heights[site.module])]
            svds[site.module] = [TruncatedSVD(U[:, :rank], S[:rank], Vh[:rank], 0.0) for U, S, Vh in parts]
        with torch.no_grad():
            for group in self.method.groups(sites):
                for site, tensors in zip(
                    group, self.method.start_group(self.config, group, GradientSource(svds))[0], strict=True
                ):
                    self.layers[site].set_stored(self.name, tensors)
        self.invalidate()
        self.prepare()

    return started


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the tables that the tests are parametrized with."""
    marks = metafunc.definition.own_markers
    left_out = () if os.environ.get("PEFT_SUITE_ALL_MODELS") else SIMILAR
    for index, mark in enumerate(marks):
        if mark.name == "parametrize" and len(mark.args) == 2:
            names, values = mark.args
            marks[index] = pytest.mark.parametrize(names, rows(values, left_out), **mark.kwargs).mark


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other types; make helpers of the tests, which skip types by lists of names, pass ours."""
    kept = []
    wanted = os.environ.get("PEFT_SUITE_TYPES", "").split()
    for item in items:
        name = type_of(item.callspec.params.values()) if hasattr(item, "callspec") else None
        if name is not None and (not wanted or name in wanted):
            item.user_properties.append(("type", name))
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for module in {item.module for item in kept}:  # type: ignore[attr-defined]
        common = sys.modules[f"{module.__package__}.testing_common"]
        utilities = sys.modules[f"{module.__package__}.testing_utils"]
        utilities._HUB_MODEL_ACCESSES = _Everything()  # type: ignore[attr-defined]
        for owner in (module, common):
            for name in ("_skip_if_conv1d_not_supported", "skip_deberta_lora_tests"):
                if hasattr(owner, name):
                    setattr(owner, name, _not_for_ours(getattr(owner, name)))


def _not_for_ours(skip: Any) -> Any:
    if hasattr(skip, "__wrapped__"):
        return skip

    @functools.wraps(skip)
    def skipped(*args: Any, **kwargs: Any) -> None:
        if not any(arg in OURS for arg in args if isinstance(arg, type)):
            skip(*args, **kwargs)

    return skipped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down the outcome of a test, with what it said where it did not pass."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        said = ""
        if call.excinfo is not None:
            error = call.excinfo.value
            said = f"{type(error).__name__}: {' '.join(str(getattr(error, 'msg', None) or error).split())}"
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        outcomes[item.nodeid] = {"type": dict(item.user_properties)["type"], "outcome": outcome, "said": said[:600]}
    return report


def pytest_sessionfinish() -> None:
    """Write all outcomes to the file that `PEFT_SUITE_OUTCOMES` names."""
    text = json.dumps({"surgery": surgery.__file__, "outcomes": outcomes}, indent=1)
    Path(os.environ["PEFT_SUITE_OUTCOMES"]).write_text(text, encoding="utf-8")
