"""Run one ONNX graph: a tower (a matrix of feature indices in, a matrix of float records out) or a head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.errors import BundleError

INPUT, OUTPUT = "features", "record"
HEAD_INPUTS, HEAD_OUTPUT = ["user", "items"], "scores"
EMBED_BATCH = 256  # rows of one embedding step, always, so that a record does not depend on its neighbours


def _open(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unrelated classes
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({error}): export the bundle again") from error


class Tower:
    """One tower of a bundle on ONNX Runtime, with fixed threads and no arena."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._session = _open(path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if [node.name for node in inputs] != [INPUT] or [node.name for node in outputs] != [OUTPUT]:
            raise BundleError(
                f"{path}: a tower has one input {INPUT!r} and one output {OUTPUT!r}: export the bundle again"
            )
        self.width = int(inputs[0].shape[1])
        self.size = int(outputs[0].shape[1])

    def run(self, features: NDArray[np.int32]) -> NDArray[np.float32]:
        """Records (b, size) float32 of index rows (b, width) int32. Several threads may run one tower at a time.

        A plain call: bound, preallocated input and output take as long (77 us either way for 20 fields and a history
        of 50, of which 3 us are not the graph), and would have to be held once a thread.
        """
        records: NDArray[np.float32] = self._session.run([OUTPUT], {INPUT: features})[0]
        return records

    def embed(self, features: NDArray[np.int32]) -> NDArray[np.float32]:
        """The same in padded batches of one fixed shape: a row's record is equal bit for bit in whatever company."""
        records = np.empty((len(features), self.size), np.float32)
        batch = np.zeros((EMBED_BATCH, self.width), np.int32)
        for start in range(0, len(features), EMBED_BATCH):
            part = features[start : start + EMBED_BATCH]
            batch[: len(part)] = part
            batch[len(part) :] = 0
            records[start : start + len(part)] = self.run(batch)[: len(part)]
        return records


class GraphHead:
    """The head of a bundle of kind `onnx`: what scores where no kernel can."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._session = _open(path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if [node.name for node in inputs] != HEAD_INPUTS or [node.name for node in outputs] != [HEAD_OUTPUT]:
            raise BundleError(
                f"{path}: a head has the inputs {', '.join(HEAD_INPUTS)} and one output {HEAD_OUTPUT!r}: "
                "export the bundle again"
            )
        self.user_size, self.item_size = (int(node.shape[1]) for node in inputs)

    def __call__(self, user: NDArray[np.float32], items: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (n,) float32 of item records (n, item_size) for one user record (user_size,)."""
        if not len(items):
            return np.empty(0, np.float32)
        scores: NDArray[np.float32] = self._session.run([HEAD_OUTPUT], {"user": user[None], "items": items})[0]
        return scores
