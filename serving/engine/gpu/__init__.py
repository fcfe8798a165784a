"""What only a GPU takes: the steps round a network's calls that stay on the device, and the operators in Triton.

`penumbra.serving.engine.steps` has the steps of a CPU, and `penumbra.serving.engine.operators` describes the operators.
"""
