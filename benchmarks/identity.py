"""Which batch sizes and sample chunks give the same bytes as one window and one sample alone, per demo model.

python -m benchmarks.identity
"""

from pathlib import Path

from benchmarks.rounds import save
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import versions

SIZES = (1, 2, 3, 4, 5, 8, 16)


def compare(runtime: Runtime) -> dict[str, float]:
    """Largest difference of any moment from alone, by batch size and by chunk; 0 means the same bytes."""
    inputs = runtime.golden_inputs()
    runtime.windows_per_batch = runtime.samples_per_call = 1
    alone = [runtime.run([window])[0] for window in inputs]
    differences = {}
    for size in SIZES:
        together = runtime.run([inputs[i % len(inputs)] for i in range(size)])
        differences[f"{runtime.card.name}: batch of {size}"] = _furthest(together, alone)
    for chunk in SIZES:
        runtime.samples_per_call = chunk
        differences[f"{runtime.card.name}: chunk of {chunk}"] = _furthest(runtime.run(inputs[:1]), alone)
    return differences


def _furthest(together: list, alone: list) -> float:
    pairs = [(moments, alone[i % len(alone)]) for i, moments in enumerate(together)]
    return max(float((a.stats_hCw - b.stats_hCw).abs().max()) for a, b in pairs)


def main() -> None:
    results: dict[str, float] = {}
    with Segmenter.open(Path("store")) as segmenter:
        for name in versions(Path("store")):
            runtime = segmenter.find(name)
            results |= segmenter.scheduler.call(lambda runtime=runtime: compare(runtime))
    save("identity", results)


if __name__ == "__main__":
    main()
