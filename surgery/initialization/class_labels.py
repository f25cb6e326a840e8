"""The classes of a head: as many as were asked for, those that were named, or those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import DataError, MethodError, OptionError, listing
from surgery.models.base_model import BaseModel
from surgery.passes.examples import labels_in

__all__ = ["HeadRequest", "data_classes"]

CLASS_TASKS = ("seq-cls", "token-cls", "image-cls")
# Tasks whose data files have a column of labels.
LABELLED_TASKS = ("seq-cls", "image-cls")
FEW_LABELS = 10_000  # more are no classes


@dataclass(frozen=True)
class HeadRequest:
    """What was said of a head's classes.

    Attributes:
        count: how many there are.
        names: their names, in order.
        data: a data file with a column of labels.
    """

    count: int | None = None
    names: Sequence[str] | None = None
    data: str | Path | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.names is not None:
            raise OptionError("give num_labels or labels, not both: the names say how many there are")
        if self.count is not None and not 1 <= self.count < FEW_LABELS:
            raise OptionError(f"num_labels must be at least 1 and below {FEW_LABELS:,}, got {self.count}")
        if self.names is not None:
            names = list(self.names)
            if len(names) < 2 or len(set(names)) < len(names) or not all(names):
                raise OptionError(f"labels are two or more different names, got {listing(map(repr, names), 5)}")

    @property
    def explicit(self) -> bool:
        """Whether classes were asked for by number or by name."""
        return self.count is not None or self.names is not None

    def classes(self, base: BaseModel, idle_for: str | None) -> list[int | str] | None:
        """Return the classes that the head is to have; None where it stays as it is.

        Args:
            base: the base model under the class of the task.
            idle_for: the method, where it has no use for data but the labels.

        Raises:
            OptionError: the task has no classes.
            DataError: the data has no labels, or none that a classifier could have.
        """
        task = base.task.name if base.task is not None else None
        if self.explicit and task not in CLASS_TASKS:
            raise OptionError(
                f"{type(base.model).__name__} has no classes: num_labels and labels belong to a task with a head "
                f"(--task {', '.join(CLASS_TASKS)})"
            )
        if self.names is not None:
            return list(self.names)
        if self.count is not None:
            return list(range(self.count))
        if self.data is None:
            return None
        if task in LABELLED_TASKS and base.head_is_free:
            return data_classes(self.data, base)
        if idle_for is not None:
            self._refuse_idle_data(base, task, idle_for)
        return None

    def _refuse_idle_data(self, base: BaseModel, task: str | None, method: str) -> None:
        """Refuse data that neither the method nor the head has a use for."""
        if task in LABELLED_TASKS:
            raise OptionError(
                f"{base.folder}: has {base.config.num_labels} classes already, which {self.data} does not change; "
                "say with --num-labels or --labels which classes a new head has"
            )
        raise MethodError(
            f"method {method} takes no data but for the labels of a classifier: choose one with --task "
            f"{' or '.join(LABELLED_TASKS)}"
        )


def data_classes(data: str | Path, base: BaseModel) -> list[int | str]:
    """Return the classes of a data file, in order.

    Raises:
        DataError: it has no labels, or none that a classifier could have.
    """
    labels = labels_in(data, base)
    if any(isinstance(label, float) for label in labels):
        raise DataError(
            f"{data}: its labels are floating-point numbers, not classes; for a regression give a model whose "
            "config.json has one label in id2label, or --num-labels 1"
        )
    numbers = [label for label in labels if isinstance(label, int)]
    highest = max(numbers, default=0)
    if min(numbers, default=0) < 0:
        raise DataError(f"{data}: has the label {min(numbers)}; classes are counted from 0")
    if max(len(labels), highest) >= FEW_LABELS:
        raise DataError(f"{data}: has {len(labels)} labels up to {highest}, more than a classifier has classes")
    if len(labels) < 2:
        raise DataError(f"{data}: has the label {listing(map(str, labels))} alone, nothing to tell apart")
    return labels
