"""Command lines over broken folders, and which of their folders are broken."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.specimens import ADAPTERS, ELSEWHERE

__all__ = ["SCENARIOS", "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """A command over an adapter and its base.

    Attributes:
        name: the command, and what sets this use of it apart.
        arguments: of the command line; `{model}`, `{adapter}`, `{other}`, `{data}` and `{labelled}` are inputs, and
            `{out}` is what is written.
        model: which base model.
        adapters: which adapters.
        other: a second adapter, which is whole.
        victims: what is broken: `model`, `adapter` or either.
        weight: how often it is drawn.
    """

    name: str
    arguments: str
    model: str = "model"
    adapters: tuple[str, ...] = ADAPTERS
    other: str | None = None
    victims: tuple[str, ...] = ("model", "adapter")
    weight: int = 2

    @property
    def command(self) -> str:
        """The command's name."""
        return self.arguments.split()[0]

    @property
    def writes(self) -> bool:
        """Whether it writes an output."""
        return "{out}" in self.arguments and "--dry-run" not in self.arguments


LLAMA = tuple(name for name in ADAPTERS if name not in ELSEWHERE)
MODEL, ADAPTER = ("model",), ("adapter",)

SCENARIOS = (
    Scenario("init vera", "init {model} --method vera --rank 2 -o {out}", victims=MODEL, weight=4),
    Scenario("init inilora", "init {model} --method inilora --rank 2 -o {out}", "sharded", victims=MODEL, weight=4),
    Scenario("init frod", "init {model} --method frod -o {out}", victims=MODEL, weight=3),
    Scenario("init smoa", "init {model} --method smoa --rank 2 -o {out} --json", victims=MODEL, weight=3),
    Scenario(
        "init giva", "init {model} --method giva --data {data} --samples 2 --rank 2 -o {out}", victims=MODEL, weight=3
    ),
    Scenario(
        "init giva, a head",
        "init {model} --method giva --data {labelled} --samples 2 --task seq-cls --rank 2 -o {out}",
        "classifier", victims=MODEL, weight=2,
    ),
    Scenario("init, a dry run", "init {model} --method frod --dry-run -o {out}", "sharded", victims=MODEL, weight=2),
    Scenario("inspect a model", "inspect {model}", "sharded", victims=MODEL, weight=3),
    Scenario("inspect spectra", "inspect {model} --spectra -v", victims=MODEL, weight=2),
    Scenario("inspect", "inspect {adapter} --json", victims=ADAPTER, weight=6),
    Scenario("inspect on the base", "inspect {adapter} --base {model} --spectra", adapters=LLAMA, weight=4),
    Scenario("inspect, a picture", "inspect {adapter} --plot {out}.svg", victims=ADAPTER, weight=1),
    Scenario(
        "convert to giva", "convert {adapter} --to giva --base {model} --rank 1 -o {out}", adapters=LLAMA, weight=5
    ),
    Scenario(
        "convert without a base", "convert {adapter} --to giva --rank 1 -o {out}", adapters=LLAMA, victims=ADAPTER,
        weight=4,
    ),
    Scenario(
        "convert a head", "convert {adapter} --to giva --rank 1 --bits 16 -o {out}", adapters=("head",), victims=ADAPTER
    ),
    Scenario(
        "convert experts", "convert {adapter} --to giva --base {model} --rank 1 -o {out}", "experts", ("on-experts",),
        weight=3,
    ),
    Scenario(
        "convert convolutions", "convert {adapter} --to lora --base {model} --rank 1 -o {out}", "images",
        ("convolution",), weight=3,
    ),
    Scenario(
        "convert on data",
        "convert {adapter} --to giva --base {model} --data {data} --samples 4 --rank 1 -o {out}",
        adapters=("lora", "giva", "packed"), weight=3,
    ),
    Scenario(
        "convert to vera", "convert {adapter} --to vera --base {model} --rank 4 --accept-loss -o {out}", adapters=LLAMA
    ),
    Scenario("convert to lora", "convert {adapter} --to lora --base {model} -o {out}", adapters=LLAMA, weight=4),
    Scenario(
        "convert to frod", "convert {adapter} --to frod --base {model} --accept-loss -o {out}", adapters=LLAMA, weight=1
    ),
    Scenario(
        "convert to smoa", "convert {adapter} --to smoa --base {model} --rank 2 --accept-loss -o {out}", adapters=LLAMA,
        weight=1,
    ),
    Scenario("merge", "merge {adapter} --base {model} -o {out}", adapters=LLAMA, weight=8),
    Scenario("merge in bfloat16", "merge {adapter} --base {model} --dtype bfloat16 -o {out} --json", "sharded", LLAMA),
    Scenario("merge a head", "merge {adapter} --base {model} -o {out}", "classifier", ("head",), weight=4),
    Scenario("merge experts", "merge {adapter} --base {model} -o {out}", "experts", ("on-experts",), weight=3),
    Scenario("merge convolutions", "merge {adapter} --base {model} -o {out}", "images", ("convolution",), weight=3),
    Scenario("merge, a dry run", "merge {adapter} --base {model} --dry-run -o {out}", adapters=LLAMA, weight=2),
    Scenario("merge over an output", "merge {adapter} --base {model} --force -o {out}", adapters=LLAMA, weight=2),
    Scenario("compare", "compare {adapter} {other}", adapters=LLAMA, other="lora", victims=ADAPTER, weight=5),
    Scenario("compare on the base", "compare {other} {adapter} --base {model}", adapters=LLAMA, other="lora", weight=4),
    Scenario(
        "compare on data", "compare {adapter} {other} --base {model} --data {data} --no-latency",
        adapters=("lora", "vera", "giva", "packed", "inilora"), other="lora",
    ),
    Scenario(
        "train, a dry run", "train {adapter} --base {model} --data {data} --dry-run",
        adapters=tuple(name for name in LLAMA if name != "frod"), weight=3,
    ),
    Scenario(
        "train", "train {adapter} --base {model} --data {data} --steps 1 --batch-size 2 -o {out}",
        adapters=("lora", "vera", "giva", "packed", "inilora", "dora"), weight=2,
    ),
    Scenario(
        "train a head", "train {adapter} --base {model} --data {labelled} --steps 1 --batch-size 2 -o {out}",
        "classifier", ("head",), weight=1,
    ),
    Scenario("push, a dry run", "push {adapter} org/name --dry-run --base-model org/base", victims=ADAPTER, weight=5),
    Scenario("push by the named base", "push {adapter} org/name --dry-run --json", victims=ADAPTER, weight=2),
    Scenario("export", "export {adapter} --for vllm --base {model} --rank 1 -o {out}", adapters=LLAMA, weight=4),
    Scenario("export alone", "export {adapter} --for sglang --rank 1 -o {out}", adapters=LLAMA, victims=ADAPTER),
    Scenario("methods", "methods --json", victims=ADAPTER, weight=1),
)  # fmt: skip
