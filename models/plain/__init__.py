"""Any network: a program that maps a picture to logits, kept as it was brought."""

from penumbra.models.contract import Method
from penumbra.models.plain.net import PlainConfig, PlainNetwork

METHOD = Method(name="plain", config=PlainConfig, build=PlainNetwork)
