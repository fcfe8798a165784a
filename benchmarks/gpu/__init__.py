"""The day a GPU is at hand: ten minutes of checks and measurements, most valuable first (docs/measure/gpu.md).

`steps` says what is run and in which order, `runner` runs each in a process of its own, `sheet` keeps what it found,
and `page` writes that down for people. One module per step; those that only check run tests of `tests/`.
"""
