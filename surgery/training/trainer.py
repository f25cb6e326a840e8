"""transformers' `Trainer` on an adapter: checkpoints that can be trusted, a stop at the end of a step, distillation."""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from surgery.errors import CheckpointError, NumericsError, OutputError, first_line
from surgery.passes.examples import Features, collated
from surgery.passes.fidelity import arguments
from surgery.system.progress import Progress
from surgery.system.text import human_seconds
from surgery.training.distillation import Teacher, divergence
from surgery.training.interruption import Interruption
from surgery.training.packed_codes import CodeTraining

__all__ = ["SAMPLE", "AdapterTrainer", "Announce", "Batches", "DistillingTrainer", "Watch", "last_checkpoint"]

COMPLETE = "complete"
CODES_FILE = "codes.safetensors"
CHECKPOINT = "checkpoint-"
LONGEST = 200  # characters of a reason that compiled code gives
# Under this name a batch holds the numbers of its samples.
SAMPLE = "sample"
# Prints a line
Announce = Callable[[str], None]
# The first steps of a run, of which the first of all is slower: the rest is estimated from the others.
FIRST_STEPS = 5


@dataclass(frozen=True)
class Batches:
    """Makes batches of samples, each filled up to its longest."""

    padding: Mapping[str, int]

    def __call__(self, features: Sequence[Features]) -> Features:
        return collated(features, self.padding)


class AdapterTrainer(Trainer):
    """The stock `Trainer`; a checkpoint that a kill cut short is not taken for one.

    The stock one takes every model with `**kwargs` for one that divides its loss by the number of items it is told.
    Many do not, and their loss would be multiplied by the number of processes, and not divided by that of a batch's
    parts.
    """

    codes: CodeTraining | None = None
    model_accepts_loss_kwargs: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_accepts_loss_kwargs and isinstance(self.train_dataset, Sequence):
            self.model_accepts_loss_kwargs = self._divides(self.train_dataset[0])

    def _divides(self, sample: Features) -> bool:
        """Whether the model's loss depends on the number of items that it is told."""
        if "labels" not in sample:
            return False
        model = self.model
        features = {name: value[None].to(self.args.device) for name, value in sample.items() if name != SAMPLE}
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
            losses = [float(model(**features, num_items_in_batch=torch.tensor(n)).loss) for n in (1, 2)]
        for module, mode in modes.items():
            module.training = mode
        return losses[0] != losses[1]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.codes is not None:
            self.codes.tensors()
        super()._save(output_dir, state_dict)
        if self.codes is not None and self.args.should_save:
            self.codes.save(Path(output_dir or str(self.args.output_dir)) / CODES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _only_numbers(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.codes is not None:
                self.codes.load(Path(resume_from_checkpoint) / CODES_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with _only_numbers(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with _only_numbers(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{CHECKPOINT}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (SafetensorError, RuntimeError) as error:  # what the system refused, as compiled code tells it
            raise OutputError(f"{folder}: cannot be written ({first_line(error, LONGEST)})") from None
        if self.args.world_size > 1:
            torch.distributed.barrier()  # each process has a file of its own in it
        if self.args.should_save:
            (folder / COMPLETE).touch()


@contextlib.contextmanager
def _only_numbers(checkpoint: Any) -> Iterator[None]:
    """What a checkpoint holds is read as numbers (torch's `weights_only`); a pickle of anything else is an error.

    Raises:
        CheckpointError: it holds something else, or is broken.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: is broken, or holds more than numbers, of which nothing was run "
            f"({first_line(error, LONGEST)}); start again with --force"
        ) from None


class DistillingTrainer(AdapterTrainer):
    """Learns a teacher's answers: KL divergence of the predictions, and the layers' hidden states.

    Dropout is off: the teacher's answers are without, and what is learnt is to match them.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, teacher: Teacher, hidden_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.hidden_weight = teacher, hidden_weight

    def _divides(self, sample: Features) -> bool:
        return False  # the loss is a mean over the batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        samples = inputs.pop(SAMPLE)
        model.eval()
        answers = self.teacher.answers(inputs, samples)
        output = model(**arguments(self.teacher.body, inputs), output_hidden_states=True)
        apart = divergence(model, output, inputs, answers)
        loss = self.hidden_weight * apart.hidden
        if apart.kl is not None:
            loss = loss + apart.kl
        return (loss, output) if return_outputs else loss


class Watch(TrainerCallback):
    """Stops where it is told to, refuses a loss that is not finite, and tells how far a training is.

    Args:
        stop: says when to stop.
        lr: the learning rate, for the advice.
        progress: called after each step.
        announce: called once, with an estimate of the time that is left.
    """

    def __init__(
        self, stop: Interruption, lr: float, progress: Progress | None, announce: Announce | None = None
    ) -> None:
        self.stop, self.lr, self.progress, self.announce = stop, lr, progress, announce
        self.loss = ""
        self._times: list[float] = []

    def _estimate(self, step: int, steps: int) -> None:
        """Tell how long the rest will take, once, after the first steps."""
        if self.announce is None or len(self._times) > FIRST_STEPS or step >= steps:
            return
        self._times.append(time.perf_counter())
        if len(self._times) == FIRST_STEPS + 1:
            pace = (self._times[-1] - self._times[0]) / FIRST_STEPS
            left = human_seconds(pace * (steps - step))
            self.announce(f"{pace:.3g} s a step: about {left} for the {steps - step:,} steps that are left")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._estimate(state.global_step, state.max_steps)
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.loss)
        if self.stop.arrived():
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.loss = f"loss {loss:.4g}"
        if not math.isfinite(loss):
            broken = _broken_weight(kwargs["model"])
            if broken is not None:
                raise CheckpointError(f"the loss is {loss}: the base model's {broken} holds values that are not finite")
            raise NumericsError(
                f"the loss is {loss} at step {state.global_step}: the learning rate {self.lr:g} is too high for this "
                "adapter and data; nothing was written"
            )


def _broken_weight(model: Any) -> str | None:
    """The name of a frozen weight with values that are not finite; None where there is none."""
    frozen = ((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)
    broken = next((name for name, weight in frozen if not bool(torch.isfinite(weight).all())), None)
    return None if broken is None else broken.removeprefix("base_model.model.").replace(".base_layer.", ".")


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; None where there is none."""
    found = {int(path.name.removeprefix(CHECKPOINT)): path for path in folder.glob(f"{CHECKPOINT}*") if _whole(path)}
    return found[max(found)] if found else None


def _whole(checkpoint: Path) -> bool:
    return checkpoint.name.removeprefix(CHECKPOINT).isdigit() and (checkpoint / COMPLETE).is_file()


def silence(trainer: Trainer) -> None:
    """Leave printing to whoever called: results go to stdout, and only results."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def random_state(seed: int) -> None:
    """The random state that a stock `Trainer` starts with."""
    from transformers import set_seed

    set_seed(seed)
    torch.manual_seed(seed)
