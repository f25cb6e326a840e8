"""Changes that no test can or should notice, and why: by the beginning of the mutant's name."""

from __future__ import annotations

__all__ = ["EQUIVALENT", "reason_for"]

# A key ends where it says enough: everything in a function, or one change of it.
EQUIVALENT: dict[str, str] = {
    "surgery/system/threads.py::": "how many threads work, not what comes of it",
    "surgery/codec/workers.py::Workers.curvatures: size <= self._room": "what is kept in memory, not what it is",
    "surgery/linalg/symmetric.py::_on_cpu:": "both roads are right on a CPU; the other one is there for GPUs",
    "surgery/linalg/symmetric.py::eigh_: not _on_cpu": "both roads are right on a CPU",
    "surgery/linalg/symmetric.py::triangular_solve: not _on_cpu": "both roads are right on a CPU",
    "surgery/linalg/symmetric.py::_fortran_columns: tensor.numpy() if": "who makes a copy",
    "surgery/linalg/symmetric.py::triangular_product: L.T @ matrix": "only taken on a GPU",
    "surgery/linalg/symmetric.py::add_gram_: wide.T -> (wide) #2": "only taken on a GPU",
    "surgery/linalg/joint.py::joint_basis: columns < SMALL": "how many threads work",
    "surgery/linalg/joint.py::_column_signs: basis.min(0, keepdim=True) -> (basis.min(0, keepdim=False))": "broadcast",
    "surgery/deltas/operators.py::InputMap.adapted: size ** 2": "which road is cheaper",
    "surgery/codec/entropy.py::_parts_of: max(PART": "how many at a time",
    "surgery/codec/feedback.py::Curvature.nbytes:": "what is kept in memory, not what it is",
    "surgery/linalg/joint.py::_favours_wide:": "which of two roads is taken to the same matrix",
    "surgery/linalg/joint.py::_sum_of_grams: (len(grams) + 1) * total.nbytes": "what is kept in memory",
    "surgery/linalg/low_rank.py::truncated_svd: matrix.numel() < SMALL": "how many threads work",
    "surgery/linalg/low_rank.py::_truncated_svd: min(rows, columns) -> (max": "which of two roads is taken",
    "surgery/linalg/symmetric.py::fill_upper_: start + 512": "how many rows at a time",
    "surgery/methods/frod.py::FRoD.shared_derived: V.shape[0] -> (V.shape[1])": "V is square there",
    "surgery/methods/frod.py::FRoD.dtype: torch.empty(0": "only its dtype counts",
    "surgery/linalg/token_products.py::leading_svd: tokens * rows * columns": "which road is cheaper",
    "surgery/codec/entropy.py::class_bits: 1 << largest.bit_length() -> (2 << ": "a longer table, cut to the same",
    "surgery/linalg/joint.py::_deficient_basis: 2 * count": "eigenvectors are those of any multiple",
    "surgery/methods/inilora.py::IniLoRA.approximation: config.variant != 'svd' or": (
        "where no weight is read there is nothing to compare it with"
    ),
    "converters/to_giva.py::_coded: max(limit - fixed(limit), 1)": "neither holds anything",
    "surgery/codec/entropy.py::_gaussian: cuts * reach + cuts // 2 + 1 -> (cuts * reach + cuts // 2 + 2": (
        "a point more than is looked at"
    ),
    "surgery/linalg/low_rank.py::svd_of_map: torch.linalg.svd(dense, full_matrices=False)": "cut to the same triplets",
    "converters/frod_fit.py::Problem.left: 3 * rows": "which of two roads is taken",
    "surgery/adapters/source.py::Change.none: torch.empty(": "only its name and shape count",
    "converters/frod_fit.py::_row_blocks: RIDGE": "how fast an iteration converges",
    "converters/frod_fit.py::_row_blocks: counts <= LONGEST_BLOCK": "how fast an iteration converges",
    "surgery/codec/layer.py::LayerCoder.__init__: step_B * step_A > SMALLEST_SCALE -> (step_B * step_A >=": (
        "a product of two square roots is never equal to the bound"
    ),
    "surgery/codec/layer.py::_Side.__init__: np.zeros(0)": "an empty array either way",
    "surgery/codec/layer.py::_inverse: torch.linalg.pinv": "the matrix is symmetric",
    "surgery/linalg/symmetric.py::Widener.__init__: torch.empty(0": "only its dtype counts",
    "surgery/linalg/joint.py::_with_inverse: V * _column_signs(V) -> (V / ": "the signs are 1 and -1",
    "surgery/adapters/source.py::_truncated: min(2 *": "more of a decomposition than is asked for, cut to the same",
    "converters/frod_fit.py::solved: TOLERANCE ** 2 -> (TOLERANCE ** 3)": "a later stop of an iteration",
    "surgery/adapters/types/own.py::_owner: self.file.layer(candidate)[stored].shape[0]": (
        "the shared basis is square"
    ),
    "surgery/adapters/types/own.py::_OwnChanges._regenerated: len(group) > 1": "what is kept, not what it is",
    "surgery/adapters/types/own.py::_RawByKey.__getitem__: self.base.raw": "a weight that is read is checked anyway",
}


def reason_for(key: str) -> str | None:
    """Why a mutant changes nothing that a test can see; None for all others."""
    return next((reason for start, reason in EQUIVALENT.items() if key.startswith(start)), None)
