"""Float weights out of an int8 ONNX file: the numbers and their names, nothing is executed.

For: files that onnxruntime's dynamic quantiser wrote, in which a matrix W is stored as integers q with W = (q - z) s.
The package `onnx` reads the file (`requirements-extensions.txt`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

QUANTIZED, ZERO, SCALE = "_quantized", "_zero_point", "_scale"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Float32 tensors by parameter name ("enc.block.0.layer.0.SelfAttention.q.weight", out x in). Raises ImportError.

    Matrices that are multiplied have lost their names; the node that multiplies keeps its module's. They are stored
    as (in, out), torch's `Linear` holds (out, in). What else is quantised (embeddings), or is no number of the model's
    (constants of one value), keeps its name, or is left out.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = {
        node.input[1].removesuffix(QUANTIZED): node.name for node in graph.node if node.op_type == "MatMulInteger"
    }
    weights = {}
    for name, array in stored.items():
        origin = name.removesuffix(QUANTIZED)
        if origin in matrices and name.endswith(QUANTIZED):
            weights[_module(matrices[origin]) + ".weight"] = _dequantised(stored, origin).T
        elif name.endswith(QUANTIZED):
            weights[origin] = _dequantised(stored, origin)
        elif array.dtype == np.float32 and array.size > 1:
            weights[name] = array
    return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}


def _dequantised(stored: dict[str, np.ndarray], origin: str) -> np.ndarray:
    """(q - z) s in float32."""
    q, z, s = (stored[origin + part].astype(np.float32) for part in (QUANTIZED, ZERO, SCALE))
    return (q - z) * s


def _module(node: str) -> str:
    """The module a node belongs to: "/enc/block.0/q/MatMul_quant" is of "enc.block.0.q"."""
    return ".".join(node.strip("/").split("/")[:-1])
