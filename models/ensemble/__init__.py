"""Deep ensembles (Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017): checkpoints of the same classes as members."""

from penumbra.models.contract import Method
from penumbra.models.ensemble.net import EnsembleConfig, EnsembleNetwork

METHOD = Method(name="ensemble", config=EnsembleConfig, build=EnsembleNetwork)
