"""What a comparison shows."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.command_line import flags, invoke


def test_what_is_shown(pair, llama: Path, texts: Path) -> None:
    plain = invoke("compare", *pair)
    assert plain.stderr.count("Note:") == 2
    assert "model.layers.*.mlp.down_proj" in plain.stdout and "output error" not in plain.stdout
    assert "LORA, 6 layers, rank 3" in plain.stdout and "weight error" in plain.stdout
    verbose = invoke("compare", *pair, "-v").stdout
    rows = [line.split() for line in verbose.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 9 and all("up_proj" in row[0] for row in rows[:3])  # what only B changes leads
    errors = [float(row[-1].rstrip("%")) for row in rows[3:]]
    assert errors == sorted(errors, reverse=True)
    quiet = invoke("compare", *pair, "-q")
    assert quiet.stderr == "" and quiet.stdout.count("\n") == 1 and quiet.stdout.startswith("weight error ")
    whole = invoke("compare", *pair, *flags(base=llama, data=texts)).stdout
    for words in ("KL(A || B)", "agreement", "perplexity", "output error", "µs / token", "not a faster model"):
        assert words in whole
