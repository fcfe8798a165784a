"""The steps of a window on a device: cut, accumulate, blend and read out, each one operator for a whole batch.

`operators` defines and documents them, `kernels` has them in Triton and `plain` in torch, where there is no Triton.
"""
