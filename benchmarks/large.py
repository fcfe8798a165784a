"""Peak memory of `penumbra predict` on one large raster: a toy of 3 classes, windows of 512x512, two samples.

The kernel counts this process's own peak as the other one's too, so it is the least that can be seen.

python -m benchmarks.large            # 20,000 x 20,000; some minutes and 20 GB of disk
python -m benchmarks.large 4000
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from benchmarks.rounds import save
from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from tests.toys import toy_card

ROWS = 512


def make_raster(path: Path, side: int) -> None:
    """A ramp with noise in tiles of JPEG, written block by block."""
    rng = np.random.Generator(np.random.PCG64(0))
    ramp = np.linspace(0, 150, side)[None, :, None].astype(np.uint8)
    block = rng.integers(0, 60, (ROWS, side, 3), dtype=np.uint8) + ramp
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"blockxsize": ROWS, "blockysize": ROWS, "compress": "jpeg", "photometric": "ycbcr", "bigtiff": "YES"}
    place = {"crs": "EPSG:32632", "transform": from_origin(400_000, 5_000_000, 1, 1)}
    with rasterio.open(path, "w", **profile, **place) as target:
        for y in range(0, side, ROWS):
            rows = np.roll(block, y, axis=1)[: side - y].transpose(2, 0, 1)
            target.write(rows, window=rasterio.windows.Window(0, y, side, rows.shape[1]))


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_raster(place / "large.tif", side)
        card, network = toy_card("latent", name="wide", window=WindowSpec(512, 512))
        export_network(network, card, place / "store")
        command = [sys.executable, "-m", "penumbra", "predict", str(place / "large.tif"), "-o", str(place / "out")]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--store", str(place / "store"), "--samples", "2", "--json"], stdout=subprocess.PIPE, check=True
        )
        seconds = time.perf_counter() - started
        timing_ms = json.loads(done.stdout)["timing_ms"]
        size_mb = sum(path.stat().st_size for path in (place / "out").iterdir()) / 2**20
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    figures = {"peak MB": peak_mb, "seconds": seconds, "seconds of writing": timing_ms["write"] / 1e3}
    save("large", {f"{side}x{side}: {name}": value for name, value in figures.items()} | {"files MB": size_mb})


if __name__ == "__main__":
    main()
