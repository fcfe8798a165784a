"""Which pictures of a folder a person should look at first, for `penumbra rank`: a score of every one, and a choice.

A choice of few is spread, because the highest scores of a film are one scene: each picture that is chosen has
the largest product of its score and its distance to those that are chosen already. That is the farthest-first traversal
(Gonzalez 1985) by which Sener and Savarese (2018) choose core-sets, weighted by what is looked for.
"""

import base64
import csv
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from penumbra.models.errors import BadOption, reason_of
from penumbra.models.files import write_whole
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import RANKED_BY, SegmentOptions, check_options
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.batch import AT_ONCE, segment_url
from penumbra.serving.files.inputs import find_images
from penumbra.serving.files.predict import IN_MEMORY
from penumbra.serving.files.receipts import PAGE_MARK
from penumbra.serving.files.report import Result, progress_bar
from penumbra.serving.render.pictures import heat_picture, overlay, shown, thumbnail
from penumbra.serving.spool import disk

CELLS, LEVELS = 8, 4
"""What a picture looks like, in few numbers: colours of 8x8 cells, and shares of the classes in 4x4."""
THUMBNAIL_PX = 240
LIGHTEST = 0.5
"""What a thumbnail shows white, of 1 - confidence and of nats of mutual information: the same for all pictures."""
PAGE = f"""<!doctype html><meta charset="utf-8">{PAGE_MARK.decode()}<title>{{title}}</title>
<style>body {{{{ font: 14px sans-serif }}}} figure {{{{ display: inline-block }}}}</style><h1>{{title}}</h1>
"""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One picture: its scores by name, None where there is none; what it looks like; and its thumbnails as JPEG."""

    image: str
    scores: dict[str, float | None]
    look_N: FloatArray
    thumbnails: tuple[bytes, ...]


class Ranker:
    """Looks at pictures with one loaded model. `look_at` may be called from several threads.

    Raises BadOption where the model has no such score. draws: whether there shall be thumbnails.
    """

    def __init__(self, segmenter: Segmenter, options: SegmentOptions, *, by: str, draws: bool) -> None:
        card = segmenter.find(options.model, options.version).card
        maps = {"mutual_information"} & {by, *card.maps(options.num_members(card))}
        self._segmenter, self._options = segmenter, options.with_maps((*maps, *["confidence"] * draws))
        self.card, self.by, self._draws = card, by, draws
        samples, reference = check_options(self._options, card, IN_MEMORY), card.novelty
        if by == "novelty" and reference is None:
            raise BadOption(f"{card.name} has no reference for novelty; `penumbra calibrate {card.name}` gives it one")
        told = samples, options.views or card.views, card.window.overlap if options.overlap is None else options.overlap
        made_of = reference and reference.needs_equals and (reference.num_samples, card.views, card.window.overlap)
        if by == "novelty" and made_of and told != made_of:
            raise BadOption(
                f"samples is {told[0]}, views is {told[1]} and overlap is {told[2]:g}; {card.name} has a novelty of "
                f"{made_of[0]}, {made_of[1]} and {made_of[2]:g}: leave all three out"
            )

    def look_at(self, url: str) -> tuple[Ranked | None, Result]:
        """Score one image. Whatever goes wrong is that image's alone, and said."""
        try:
            _, prediction = segment_url(self._segmenter, url, self._options)
            thumbnails = thumbnails_of(prediction, self.by) if self._draws else ()
            ranked = Ranked(url, scores_of(prediction), look_of(prediction), thumbnails)
        except Exception as error:
            return None, Result(url, "failed", reason_of(error))
        return ranked, Result(url, "made", warnings="\n".join(prediction.warnings))


def rank_images(ranker: Ranker, source: str) -> tuple[list[Ranked], list[Result]]:
    """Score all images of a folder, a pattern or a file: the highest first, and what is to be said of any.

    Raises BadOption where there is no image.
    """
    found = find_images(source)
    reported = [Result(url, "skipped", reason) for url, reason in found.skipped.items()]
    ranked = []
    with ThreadPoolExecutor(AT_ONCE) as threads, progress_bar() as bar:
        work = threads.map(ranker.look_at, found.images)
        for one, result in bar.track(work, total=len(found.images), description=ranker.card.name):
            ranked += [one] if one else []
            reported += [result] if result.error or result.warnings else []
    return sorted(ranked, key=lambda one: -_value(one, ranker.by)), reported


def scores_of(prediction: Prediction) -> dict[str, float | None]:
    """Name the scores of an answer; a mutual information is the mean over the pixels that hold a measurement."""
    measured = prediction.labels_HW.size > prediction.num_void
    information = prediction.maps.get("mutual_information") if measured else None
    mean = None if information is None else float(np.nanmean(information))
    return {name: prediction.shares.get(name) for name in RANKED_BY} | {"mutual_information": mean}


def look_of(prediction: Prediction) -> FloatArray:
    """Say what a picture looks like, in 0..1, so that the sum of absolute differences is that of two pictures, 0..2.

    It is the mean difference of the cells' colours, and that of the cells' class shares.
    """
    assert prediction.image is not None
    cells_88 = Image.fromarray(shown(prediction)).resize((CELLS, CELLS), Image.Resampling.BOX)
    colors_N = np.asarray(cells_88, np.float32).ravel() / 255
    rows = [
        part for row in np.array_split(prediction.labels_HW, LEVELS) for part in np.array_split(row, LEVELS, axis=1)
    ]
    shares = [np.bincount(part.ravel(), minlength=256) / max(part.size, 1) for part in rows]
    shares_N = np.stack(shares)[:, : prediction.card.num_classes].ravel() / 2
    return np.concatenate((colors_N / colors_N.size, shares_N / len(rows))).astype(np.float32)


def thumbnails_of(prediction: Prediction, by: str) -> tuple[bytes, ...]:
    """Draw the picture under its labels, and beside it where it is unsure, as JPEGs."""
    is_mutual = by == "mutual_information"
    values_HW = prediction.maps[by] if is_mutual else 1 - prediction.maps["confidence"]
    pictures = (Image.fromarray(overlay(prediction)), heat_picture(values_HW, top=LIGHTEST))
    return tuple(thumbnail(picture, THUMBNAIL_PX, "JPEG") for picture in pictures)


def spread(ranked: Sequence[Ranked], by: str, budget: int) -> list[Ranked]:
    """Choose up to `budget` pictures, the highest first and then by score times distance; of two copies only one."""
    if not ranked:
        return []
    look_NM = np.stack([one.look_N for one in ranked])
    score_N = np.array([max(_value(one, by), 0.0) for one in ranked])
    nearest_N = np.full(len(ranked), np.inf)  # nothing is chosen yet
    chosen: list[Ranked] = []
    while len(chosen) < budget and (nearest_N > 0).any():
        weight_N = nearest_N if chosen else np.ones(len(ranked))
        best = int(np.where(nearest_N > 0, score_N * weight_N, -1.0).argmax())
        chosen.append(ranked[best])
        nearest_N = np.minimum(nearest_N, np.abs(look_NM - look_NM[best]).sum(1))
    return chosen


def rows_of(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Give the facts of what was ranked, for CSV and JSON."""
    return [{"rank": rank, "image": one.image, **one.scores} for rank, one in enumerate(ranked, 1)]


def write_csv(ranked: Sequence[Ranked]) -> str:
    """Write the facts as CSV, with a line of names; what there is not is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ("rank", "image", *RANKED_BY), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(ranked))
    return file.getvalue()


def write_sheet(path: Path, ranked: Sequence[Ranked], title: str) -> None:
    """Write a page that needs no other file: the pictures in their order, each with its thumbnails and scores."""
    page = [PAGE.format(title=escape(title))]
    for row, one in zip(rows_of(ranked), ranked, strict=True):
        pictures = "".join(
            f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}"> ' for data in one.thumbnails
        )
        said = ", ".join(f"{name} {value:.3g}" for name, value in one.scores.items() if value is not None)
        page.append(
            f"<figure>{pictures}<figcaption>{row['rank']}. {escape(one.image)}<br>{said}</figcaption></figure>\n"
        )
    with disk():
        write_whole(path, "".join(page).encode(errors="backslashreplace"))  # a name may be no text


def _value(one: Ranked, by: str) -> float:
    value = one.scores[by]
    return -1.0 if value is None else value
