"""A head for the labels of the data, in place of an adapter's own or where it has none."""

from __future__ import annotations

from pathlib import Path

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import contents_of
from surgery.adapters.fitting import own_task
from surgery.adapters.names import MODEL_PREFIX
from surgery.errors import OptionError
from surgery.initialization.class_labels import LABELLED_TASKS, data_classes
from surgery.models.base_model import TASKS, BaseModel
from surgery.models.heads import carried_modules, carried_tensors

__all__ = ["with_new_head"]


def with_new_head(
    adapter: Adapter, base: str | Path, data: str | Path, task: str | None, seed: int, trust_remote_code: bool = False
) -> Adapter:
    """Return a copy of an adapter with a fresh head of as many classes as the data has labels.

    Args:
        adapter: the adapter.
        base: its base model.
        data: the data file.
        task: what the model is for; default the task that the adapter was made for.
        seed: of the head's first values.
        trust_remote_code: run model code that comes with the base.

    Raises:
        DataError: the data has no labels, or none that a classifier could have.
        OptionError: the task has no classes.
    """
    chosen = task or own_task(adapter)
    opened = BaseModel.open(base, chosen, trust_remote_code)
    if opened.task is None or opened.task.name not in LABELLED_TASKS:
        raise OptionError(
            f"a new head belongs to a task with classes: choose it with --task {' or '.join(LABELLED_TASKS)}"
        )
    classes = data_classes(data, opened)
    name = opened.task.name
    opened = BaseModel.open(base, name, trust_remote_code, labels=classes)
    heads = carried_modules(opened)
    started, _ = carried_tensors(opened, seed)
    old = {key for name, key in contents_of(adapter).carried.items() if name.startswith(tuple(f"{h}." for h in heads))}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in old}
    tensors |= {f"{MODEL_PREFIX}{name}": tensor for name, tensor in started.items()}
    saved = [name for name in adapter.config.get("modules_to_save") or () if name not in heads]
    config = {
        **adapter.config,
        "modules_to_save": [*saved, *heads],
        "task_type": TASKS[name].peft_task_type,
    }
    provenance = {**adapter.provenance, "labels": classes, "task": name}
    made = adapter.like(config, tensors)
    made.provenance, made.weights = provenance, None
    return made
