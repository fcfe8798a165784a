"""Deep ensembles (Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017): checkpoints of the same classes as members."""

from penumbra.models.contract import Method
from penumbra.models.ensemble.net import EnsembleConfig, EnsembleNetwork

METHOD = Method(
    name="ensemble",
    citation=(
        "Lakshminarayanan, Pritzel, Blundell. Simple and Scalable Predictive Uncertainty Estimation using Deep "
        "Ensembles. NeurIPS 2017."
    ),
    config=EnsembleConfig,
    build=EnsembleNetwork,
)
