"""One file for each hazard that is only said: its rule, its message, and its moments, of those in ``moments.py``.

Nothing else of the package knows a guard. To take one out, delete its file, its import
and its line here.

A guard looks at a ``View`` of the model, in ``model/view.py``:

- ``layers``: those with adapters on them, by name. ``adapted_weights``: the names of
  the weights that have an update.
- ``base_parameters``: all but those of adapters. ``trainable_base``: those of them that
  train in full (``modules_to_save``, biases). ``frozen_base``: the others.
- ``frozen_by_user``: the names of weights that the user froze.
- ``record``: what the model remembers of its base and its adapters. ``adapter``: what it
  remembers of the active one. ``adapter.networks``: networks that stand still, and
  ``copies`` of others.
- ``is_fresh()``: all updates are still zero.

How a guard speaks:

- ``rank_zero_info``, in the log of a fit: what may be meant so, and how networks and
  files are treated.
- ``warn``: what is probably wrong. Python shows the same text once for each line of the
  user's code. A call has no log, so it warns of what a fit would only log.
- ``warn_in_each_fit``: the same, of arguments, the model or the length of a fit. A cell
  that runs again says it again.
"""

from lightning_lora import moments
from lightning_lora.guards.averages_by_name import AveragesByName
from lightning_lora.guards.base_shown import BaseShown
from lightning_lora.guards.copies_never_moved import CopiesNeverMoved
from lightning_lora.guards.copies_without_updates import CopiesWithoutUpdates
from lightning_lora.guards.dead_adapters import DeadAdapters
from lightning_lora.guards.diverged import Diverged
from lightning_lora.guards.frozen_after_learning import FrozenAfterLearning
from lightning_lora.guards.frozen_in_modules_to_save import FrozenInModulesToSave
from lightning_lora.guards.hooked_weights import HookedWeights
from lightning_lora.guards.large_hyperparameters import LargeHyperparameters
from lightning_lora.guards.learning_rates import LearningRates
from lightning_lora.guards.looks_untrained import LooksUntrained
from lightning_lora.guards.networks_standing_still import NetworksStandingStill
from lightning_lora.guards.nothing_learned import NothingLearned
from lightning_lora.guards.overflown import Overflown
from lightning_lora.guards.read_by_hand.reads import ReadByHand
from lightning_lora.guards.refused_exports import RefusedExports
from lightning_lora.guards.replaced_layers import ReplacedLayers
from lightning_lora.guards.rounded import Rounded
from lightning_lora.guards.running_statistics import RunningStatistics
from lightning_lora.guards.scaled_for_sgd import ScaledForSGD
from lightning_lora.guards.tied import Tied
from lightning_lora.guards.token_heads import TokenHeads
from lightning_lora.guards.unfrozen_but_not_trained import UnfrozenButNotTrained
from lightning_lora.guards.untargeted.untargeted_weights import Untargeted
from lightning_lora.guards.untied import Untied
from lightning_lora.guards.written_weights import WrittenWeights

moments.GUARDS[:] = [
    ReplacedLayers,
    FrozenAfterLearning,
    LearningRates,
    ScaledForSGD,
    NetworksStandingStill,
    FrozenInModulesToSave,
    LargeHyperparameters,
    AveragesByName,
    LooksUntrained,
    UnfrozenButNotTrained,
    Tied,
    TokenHeads,
    RefusedExports,
    Untargeted,
    HookedWeights,
    ReadByHand,
    BaseShown,
    DeadAdapters,
    WrittenWeights,
    CopiesWithoutUpdates,
    CopiesNeverMoved,
    NothingLearned,
    RunningStatistics,
    Diverged,
    Untied,
    Overflown,
    Rounded,
]
