"""An answer as a notebook shows it: the labels over the picture, where it is unsure, its classes, and its warnings."""

from base64 import b64encode
from html import escape

from PIL import Image

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.render.pictures import heat_picture, overlay, paint, range_of, thumbnail
from penumbra.serving.render.tables import class_table

LONGEST_PX = 480
"""The longer side of a picture that is shown; a notebook keeps what it shows."""
SHOWN = ("entropy", "mutual_information")
"""The map that is shown is the first of these that the answer has."""


def html_of(prediction: Prediction) -> str:
    """Write an answer as a piece of HTML that needs nothing else: two pictures, a legend, scores and warnings."""
    card, (height, width) = prediction.card, prediction.labels_HW.shape
    samples = f"{prediction.num_samples} sample{'s' * (prediction.num_samples > 1)}"
    said = [f"<b>{escape(card.name)}</b>, version {card.version}: {width} x {height} px, {samples}"]
    said += [f"{name.replace('_', ' ')}: {score:.1%}" for name, score in prediction.shares.items()]
    said += [f"<b>Warning:</b> {escape(warning)}" for warning in prediction.warnings]
    figures = "".join(
        f"<figure style='margin:0 1em 0 0'><img src='data:image/png;base64,{b64encode(png).decode()}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, png in _pictures(prediction).items()
    )
    rows = "".join(
        f"<tr><td><span style='color:rgb{tuple(card.classes[row['id']].color)}'>&#9632;</span> {escape(row['name'])}"
        f"</td><td>{row['share']:.1%}</td><td>{_share(row.get('expected_error'))}</td></tr>"
        for row in sorted(class_table(prediction), key=lambda row: -row["share"])
    )
    head = "<tr><th>class</th><th>share</th><th>expected error</th></tr>"
    legend = f"<table style='white-space:nowrap;align-self:start'>{head}{rows}</table>"
    return f"{'<br>'.join(said)}<div style='display:flex'>{figures}{legend}</div>"


def _pictures(prediction: Prediction) -> dict[str, bytes]:
    image = prediction.image
    is_photograph = image is not None and image.shape[2] == 3 and image.dtype == "uint8"
    labels = overlay(prediction) if is_photograph else paint(prediction.labels_HW, prediction.card)
    pictures = {"labels": Image.fromarray(labels)}
    for name in [name for name in SHOWN if name in prediction.maps][:1]:
        _, top = range_of(name, prediction.card, prediction.maps[name])
        caption = f"{name.replace('_', ' ')}, dark 0 to light {top:.2f} nats"
        pictures[caption] = heat_picture(prediction.maps[name], top=top)
    return {caption: thumbnail(picture, LONGEST_PX, "PNG") for caption, picture in pictures.items()}


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
