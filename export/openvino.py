"""Write graphs for OpenVINO, which reads ONNX; the precision is chosen where they are compiled, at load."""

from penumbra.export.onnx import write

PRECISIONS = ("fp32", "bf16")

__all__ = ["PRECISIONS", "write"]
