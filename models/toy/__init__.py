"""The toy method: closed-form logits of pixel and noise, no weights. The whole server is tested against it."""

from penumbra.models.contract import Method
from penumbra.models.toy.net import ToyConfig, ToyNetwork

METHOD = Method(name="toy", config=ToyConfig, build=ToyNetwork)
