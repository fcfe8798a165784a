"""Ask a Penumbra server from Python: pictures in, a `Prediction` out, with httpx and numpy and nothing else.

`Client` waits, `AsyncClient` awaits; both have the same methods.
"""

from penumbra_client.answers import Job, Model, Prediction, Scores
from penumbra_client.client import AsyncClient, Client
from penumbra_client.errors import Failed, PenumbraError, Refused, Unavailable
from penumbra_client.options import Options

__all__ = [
    "AsyncClient", "Client", "Failed", "Job", "Model", "Options", "PenumbraError", "Prediction", "Refused", "Scores",
    "Unavailable",
]  # fmt: skip
