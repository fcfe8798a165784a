"""Write graphs for OpenVINO, which reads ONNX; bf16 is chosen where they are compiled, at load, and int8 is in them."""

from penumbra.export.onnx import write

PRECISIONS = ("fp32", "bf16", "int8")

__all__ = ["PRECISIONS", "write"]
