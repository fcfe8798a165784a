"""The function of CVAT, run and judged by the real `cvat_sdk`."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from penumbra_client import Client
from PIL import Image

from tests.conftest import picture
from tests.integrations.tools import ENVIRONMENT, PYTHON, ROOT, needs
from tests.serving.server import Server

pytestmark = [pytest.mark.slow, needs("cvat_sdk")]

RUN = """
import json, logging, sys
import PIL.Image
import numpy as np
from cvat_sdk import models
from cvat_sdk.auto_annotation.driver import _AnnotationMapper, _DetectionFunctionContextImpl
from cvat_sdk.masks import decode_mask

sys.path.insert(0, sys.argv[1])
import penumbra_cvat

function = penumbra_cvat.create(url=sys.argv[2], model="toy-latent", min_pixels=int(sys.argv[5]))
task = [
    models.Label(id=100 + one.id, name=one.name, type="any", attributes=[], sublabels=[])
    for one in function.spec.labels
]
image, is_polygons, threshold = PIL.Image.open(sys.argv[3]), sys.argv[4] == "polygons", float(sys.argv[6])
mapper = _AnnotationMapper(
    logging.getLogger(), function.spec.labels, task, allow_unmatched_labels=False, conv_mask_to_poly=is_polygons
)
context = _DetectionFunctionContextImpl(frame_name="a.png", conf_threshold=threshold, conv_mask_to_poly=is_polygons)
tags, shapes = mapper.validate_and_remap(function.detect(context, image), 7)
assert not tags and all(shape.frame == 7 for shape in shapes)
size = {"image_width": image.width, "image_height": image.height}
print(json.dumps([
    [shape.type.value if hasattr(shape.type, "value") else str(shape.type), shape.label_id - 100,
     shape.points if is_polygons else decode_mask(shape.points, **size).tolist()]
    for shape in shapes
]))
"""


def annotated(
    server: Server, path: Path, kind: str, *, min_pixels: int = 1, threshold: float = 0.0
) -> list[tuple[str, int, list]]:
    folder = ROOT / "integrations" / "cvat"
    command = [PYTHON, "-c", RUN, folder, server.url, path, kind, str(min_pixels), str(threshold)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shapes: list[tuple[str, int, list]] = json.loads(done.stdout)
    return shapes


@pytest.fixture
def path(rng: np.random.Generator, tmp_path: Path) -> Path:
    tiles = Image.fromarray(picture(rng, 6, 8))
    tiles.resize((80, 60), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_masks_are_the_answers_labels(server: Server, path: Path) -> None:
    with Client(server.url) as client:
        prediction = client.segment(path, model="toy-latent")
    shapes = annotated(server, path, "masks")
    labels = np.full(prediction.labels.shape, 255, np.uint8)
    for kind, k, mask in shapes:
        assert kind == "mask"
        labels[np.array(mask)] = k
    assert np.array_equal(labels, prediction.labels)
    sure = annotated(server, path, "masks", threshold=0.9)
    total = sum(int(np.sum(mask)) for _, _, mask in sure)
    assert total == int((prediction.maps["confidence"] >= 0.9).sum())


def test_polygons_are_the_answers_regions(server: Server, path: Path) -> None:
    shapes = annotated(server, path, "polygons", min_pixels=50)
    assert shapes and all(kind == "polygon" and len(points) >= 6 for kind, _, points in shapes)
    xs, ys = np.concatenate([np.array(points).reshape(-1, 2) for _, _, points in shapes]).T
    assert xs.min() >= 0 and xs.max() <= 80 and ys.min() >= 0 and ys.max() <= 60
