"""An auto-annotation function of CVAT: masks or polygons of every class, made by a Penumbra server.

    cvat-cli task auto-annotate 137 --function-file penumbra_cvat.py -p model=str:np_semiseg-camvid

CVAT's `cvat_sdk.auto_annotation` calls `create` with the parameters, and then `detect` for every frame.
"""

import json
from collections.abc import Iterator
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import PIL.Image
from cvat_sdk import models
from cvat_sdk.masks import encode_mask
from penumbra_client import Client, Options


class PenumbraFunction:
    """A detection function: one mask for each class in a frame, or one polygon for each region of a class.

    Of pixels whose confidence is below CVAT's threshold nothing is said; of polygons those whose mean confidence is.
    DEVIATION: CVAT's polygons have no holes, so a region's hole is covered by it, and the smaller regions in it are
    drawn above.
    """

    def __init__(self, url: str, model: str, key: str, max_risk: float, min_pixels: int) -> None:
        self._client = Client(url, key=key or None)
        served = {one.name: one for one in self._client.models()}
        if not model and len(served) == 1:
            (model,) = served
        if model not in served:
            raise ValueError(f"the server has no model {model!r}; there are {', '.join(served)}")
        self._options: Options = {"model": model, "version": served[model].version, "outputs": "confidence"}
        if max_risk:
            self._options["max_risk"] = max_risk
        self._min_pixels = min_pixels
        self.spec = cvataa.DetectionFunctionSpec(
            labels=[cvataa.label_spec(name, k) for k, name in enumerate(served[model].classes)]
        )

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[models.LabeledShapeRequest]:
        shapes = self._polygons if context.conv_mask_to_poly else self._masks
        return list(shapes(image, context.conf_threshold or 0.0))

    def _masks(self, image: PIL.Image.Image, least_confidence: float) -> Iterator[models.LabeledShapeRequest]:
        prediction = self._client.segment(image, **self._options)
        is_sure_HW = prediction.maps["confidence"] >= least_confidence
        for k in range(len(prediction.classes)):
            mask_HW = prediction.mask(k) & is_sure_HW
            if mask_HW.sum() >= self._min_pixels:
                yield cvataa.mask(k, encode_mask(mask_HW))

    def _polygons(self, image: PIL.Image.Image, least_confidence: float) -> Iterator[models.LabeledShapeRequest]:
        options: Options = {**self._options, "min_pixels": self._min_pixels}
        asked = self._client.render(image, "application/geo+json", **options)
        regions: list[dict[str, Any]] = json.loads(asked)["features"]
        for region in sorted(regions, key=lambda one: -one["properties"]["pixels"]):
            if region["properties"]["mean_confidence"] >= least_confidence:
                outline, *_ = region["geometry"]["coordinates"]
                points = [number for point in outline[:-1] for number in point]
                yield cvataa.polygon(region["properties"]["id"], points)


def create(
    url: str = "http://localhost:3000", model: str = "", key: str = "", max_risk: float = 0.0, min_pixels: int = 1
) -> PenumbraFunction:
    """Make the function.

    model: may be left out where one is served. max_risk: the share of pixels that may be answered and wrong; the most
    uncertain ones are left to the annotator. min_pixels: smaller masks and regions are left out.
    """
    return PenumbraFunction(url, model, key, max_risk, min_pixels)
