"""`make quick`, or `python -m tests.quick`: a chosen part of the tests that touches every package, in under a minute.

It is what a developer runs after each change. `make test` is everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

__all__ = ["QUICK"]

# By package, its quickest tests that compute something of its own. `tests/lint/test_mirror.py` checks that every
# package is here.
QUICK: dict[str, str] = {
    "system": "test_text test_registry test_threads test_keywords test_dtypes",
    "storage": "test_json_files test_atomic_file test_folder_checks test_format_version test_safetensors_read",
    "linalg": "test_joint test_low_rank test_metric test_seeded test_spectral_groups test_spectral_scores",
    "deltas": "test_operators test_products test_sparse test_on_layers",
    "codec": "test_factors test_feedback test_one_layer",
    "models": "test_sites test_module_names test_checkpoint_names test_heads test_config_limits",
    "methods": "test_vera test_regeneration",
    "adapters": "test_names test_contents test_config_schema test_wrapper_names test_foreign_formats",
    "adapters/types": "test_hira test_loha test_lokr test_patterns test_config_rules test_tensor_checks",
    "formats": "test_pickle test_sglang test_server",
    "passes": "test_data_files test_chats",
    "peft_types": "test_attachment",
    "display": "test_tables",
    "initialization": "test_class_labels",
    "comparison": "test_report",
    "inspection": "test_picture",
    "merging": "test_plan",
    "publishing": "test_checks",
    "training": "test_settings test_new_head",
    "converters": "test_forms test_request test_budget_search test_smoa_fit",
    "blending": "test_naming test_combinations",
    "exporting": "test_one_rank",
    "serving": "test_cache",
    "cli": "test_failures test_output test_methods",
    "lint": "test_imports test_mirror",
}

if __name__ == "__main__":
    tests = Path(__file__).parent
    files = [str(tests / folder / f"{name}.py") for folder, names in QUICK.items() for name in names.split()]
    sys.exit(pytest.main([*files, *sys.argv[1:]]))
