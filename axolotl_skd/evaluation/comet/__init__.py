"""COMET, the learned score of a translation (Rei et al., 2022, https://aclanthology.org/2022.wmt-1.52).

Two ways to the same number: the estimator of this package (torch and transformers, in this process)
and the package unbabel-comet, which needs older libraries than Axolotl's and therefore a Python of
its own.
"""

from axolotl_skd.evaluation.comet.errors import CometCheckpointError, CometUnavailableError
from axolotl_skd.evaluation.comet.scores import comet_scores

__all__ = ["CometCheckpointError", "CometUnavailableError", "comet_scores"]
