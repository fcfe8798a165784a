"""The one thing pyproject.toml cannot say: the compiled kernels are optional (no compiler, no failure)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "penumbra.serving.engine._kernels",
            ["serving/engine/kernels.c"],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
            optional=True,
        )
    ]
)
