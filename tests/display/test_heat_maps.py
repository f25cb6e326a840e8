"""Heat maps: short labels, and no use of pyplot."""

from __future__ import annotations

from pathlib import Path

from surgery.display.heat_maps import short_number, short_roles


def test_pictures_leave_pyplot_alone(lora: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"import sys, surgery; surgery.inspect({str(lora)!r}, {str(tmp_path / 'x.png')!r}); " + (
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_short_roles() -> None:
    assert short_roles(["model.layers.*.self_attn.q_proj", "lm_head"]) == ["self_attn.q_proj", "lm_head"]
    both = ["encoder.block.*.layer.0.q", "decoder.block.*.layer.0.q"]
    assert short_roles(both) == ["encoder: layer.0.q", "decoder: layer.0.q"]


def test_short_numbers() -> None:
    numbers = [0.0, 0.0123, 4.56, 99.4, 99.6, 108.7, 1234.0, 1e6]
    assert [short_number(number) for number in numbers] == ["0", "0.012", "4.6", "99", "100", "109", "1234", "1e+06"]
