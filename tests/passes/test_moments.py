"""Second moments are those of the model that PEFT makes."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from surgery.converters.calibration import Calibration
from surgery.passes.moments import gather_moments
from tests.helpers.hooked import source_on
from tests.helpers.models import load_base, ragged, relative_difference


def test_calibration_measures_the_model_that_peft_makes(tied: tuple[Path, Path]) -> None:
    base, adapter = tied
    source = source_on(base, adapter)
    examples = ragged("llama")
    calibration = Calibration(load_base(base), source, examples, batch_size=2)
    given = calibration.moments_of(source.sites)
    found = {site: moments for site, moments in given.items() if moments is not None}
    assert len(found) == len(source.sites)
    reference = PeftModel.from_pretrained(load_base(base), adapter).eval().get_base_model()
    expected = gather_moments(reference, calibration.feed(), list(source.sites))
    for site, moments in found.items():
        wanted = expected[site.module]
        assert relative_difference(moments.F, wanted.F) < 1e-4, site.module
        # A first token's query has one key to choose from: rounding decides whether the loss feels it.
        assert "q_proj" in site.module or relative_difference(moments.C, wanted.C) < 1e-4, site.module
    # A control: the bare model's are others.
    bare = gather_moments(load_base(base), calibration.feed(), list(source.sites))
    assert max(relative_difference(found[site].F, bare[site.module].F) for site in found) > 0.1
