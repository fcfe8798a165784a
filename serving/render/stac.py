"""STAC 1.1: what a model is by the extension MLM, and the item of an answer that was written as TIFFs.

https://github.com/radiantearth/stac-spec, https://github.com/stac-extensions/mlm (1.5),
https://github.com/stac-extensions/classification (2.0), https://github.com/stac-extensions/projection (2.0)
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np

from penumbra.models.card import IGNORE, Card
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.layout import PIXELS
from penumbra.serving.render.ground import Ground, Unplaced

EXTENSIONS = [
    "https://stac-extensions.github.io/mlm/v1.5.0/schema.json",
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
]
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
WRITTEN_BY = {".ts": "torch.jit.save", ".pt2": "torch.export.save", ".onnx": "onnx.save", ".engine": "tensorrt"}
"""What wrote a graph, by the end of its name."""


def item(name: str, properties: Mapping[str, Any], assets: Mapping[str, Any]) -> dict[str, Any]:
    """Make an item without a place, of this moment: neither a picture file nor a card says when something was seen."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "Feature", "stac_version": "1.1.0", "stac_extensions": [*EXTENSIONS], "id": name,
        "properties": {"datetime": now, "created": now} | dict(properties), "geometry": None,  # which may be long
        "links": [], "assets": dict(assets),
    }  # fmt: skip


def model_properties(card: Card) -> dict[str, Any]:
    """Describe a model in the fields of MLM, and the bands that it reads."""
    spec, export = card.input, card.export
    name = card.name.rstrip("._-")
    is_torch = export is None or export.backend in ("torchscript", "aot")
    factor, offset = (values[:: -1 if spec.order == "BGR" else 1] for values in spec.factor_offset)
    window = [card.window.height or -1, card.window.width or -1]
    picture = {
        "name": "picture", "bands": [*spec.bands],
        "input": {"shape": [-1, spec.num_bands, *window], "dim_order": ["batch", "bands", "height", "width"],
                  "data_type": spec.dtype},
        "value_scaling": [{"type": "z-score", "mean": -b / a, "stddev": 1 / a}
                          for a, b in zip(factor, offset, strict=True)],
    }  # fmt: skip
    tasks = ["semantic-segmentation"]
    maps = card.maps(card.num_members(card.sampling.default_samples))
    return {
        "title": f"{card.name} version {card.version}",
        "description": f"Semantic segmentation with uncertainty per pixel, trained on {card.provenance.data or '?'}",
        "mlm:name": name if len(name) > 2 and name[0].isalpha() else f"model {name}",
        "mlm:architecture": card.method, "mlm:tasks": tasks,
        "mlm:framework": "PyTorch" if is_torch else "ONNX",
        "mlm:input": [picture],
        "mlm:output": [
            {"name": "labels", "tasks": tasks, "classification:classes": classes_of(card),
             "result": {"shape": [-1, *window], "dim_order": ["batch", "height", "width"], "data_type": "uint8"}},
            {"name": "maps", "tasks": tasks, "classification:classes": [], "description": ", ".join(maps),
             "result": {"shape": [-1, len(maps), *window], "dim_order": ["batch", "map", "height", "width"],
                        "data_type": "float32"}},
        ],
        "mlm:hyperparameters": {"sampling": card.sampling.kind, "samples": card.sampling.default_samples,
                                "views": card.views, "overlap": card.window.overlap},
        "bands": bands_of(card),
    } | ({"mlm:framework_version": export.torch} if export and is_torch else {})  # fmt: skip


def model_assets(card: Card, folder: str) -> dict[str, Any]:
    """List an artifact's graphs, which lie in a folder: a path or URL from where the item is."""
    files = {name: name[name.rfind(".") :] for name in (card.export.files if card.export else ())}
    return {
        name: {
            "href": f"{folder}/{name}", "title": name, "roles": ["mlm:model"], "mlm:artifact_type": WRITTEN_BY[kind],
            "type": "application/octet-stream", "bands": bands_of(card),
        }
        for name, kind in files.items() if kind in WRITTEN_BY
    }  # fmt: skip


def bands_of(card: Card) -> list[dict[str, str]]:
    """List the bands that a model reads: MLM wants them of an item, and STAC then of an asset too."""
    return [{"name": band} for band in card.input.bands]


def classes_of(card: Card) -> list[dict[str, Any]]:
    """List the classes as the extension `classification` does: plain names, and descriptions as the card has them."""
    return [
        {"value": k, "name": re.sub(r"[^0-9A-Za-z_-]+", "_", one.name) or "_", "description": one.name,
         "color_hint": "{:02X}{:02X}{:02X}".format(*one.color)}
        for k, one in enumerate(card.classes)
    ]  # fmt: skip


def answer_item(prediction: Prediction, name: str, files: Mapping[str, str], model: str) -> bytes:
    """Write the item of an answer's TIFFs (`labels`, `maps`). files, model: paths of them and of the artifact's folder,
    from where the item is."""
    card = prediction.card
    facts = {f"penumbra:{fact}": value for fact, value in (prediction.origin | prediction.shares).items()}
    none = {"value": IGNORE, "name": "no_label", "description": "withheld, or no measurement", "nodata": True}
    classes = [*classes_of(card), none]
    bands = {
        "labels": [{"name": "labels", "data_type": "uint8", "nodata": IGNORE, "classification:classes": classes}],
        "maps": [{"name": one, "data_type": "float32", "nodata": "nan"} | ({"unit": unit} if unit else {})
                 for one in prediction.maps for unit in [card.unit_of(one)]],
    }  # fmt: skip
    assets = {
        kind: {"href": path, "type": COG, "roles": ["data"], "title": kind, "bands": bands[kind]}
        for kind, path in files.items()
    }
    found = item(name, facts | model_properties(card), assets | model_assets(card, model))
    place = prediction.image and prediction.image.place
    if place and place.crs and place.transform != PIXELS:
        code = place.crs.to_epsg()
        found["stac_extensions"].append(PROJECTION)
        found["properties"] |= {
            "proj:code": f"EPSG:{code}" if code else None, "proj:shape": list(prediction.labels_HW.shape),
            "proj:transform": list(place.transform)[:6],
        } | ({} if code else {"proj:wkt2": place.crs.to_wkt(version="WKT2_2019")})  # fmt: skip
    with suppress(Unplaced):
        found |= _outline(prediction)
    return json.dumps(found, allow_nan=False, indent=1).encode()


def _outline(prediction: Prediction) -> dict[str, Any]:
    """Find the picture's outline on the ground, and its box, whose west is above its east across the 180th meridian.

    Raises Unplaced.
    """
    height, width = prediction.labels_HW.shape
    frame = [[0, 0], [0, height], [width, height], [width, 0], [0, 0]]
    outline = next(Ground(prediction.image).to_degrees([{"type": "Polygon", "coordinates": [frame]}]))
    is_one = outline["type"] == "Polygon"
    parts = [np.array(polygon[0]) for polygon in ([outline["coordinates"]] if is_one else outline["coordinates"])]
    points = np.concatenate(parts)
    west = min(part[:, 0].min() for part in parts if is_one or part[:, 0].max() > 0)
    east = max(part[:, 0].max() for part in parts if is_one or part[:, 0].min() < 0)
    box = (west, points[:, 1].min(), east, points[:, 1].max())
    return {"geometry": outline, "bbox": [float(side) for side in box]}
