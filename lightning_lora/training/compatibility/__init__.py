"""What else a Trainer may have beside adapters: each kind of thing has a file, and its functions are listed here."""

from lightning_lora.training.compatibility.averages import (
    average_what_trains,
    begin_averages,
    drop_averages,
)
from lightning_lora.training.compatibility.bars import end_bar, tell_of_interrupt
from lightning_lora.training.compatibility.callbacks import (
    about_lightnings_table,
    callbacks_of,
    check_callbacks,
    kinds_of,
    monitored_checkpoint,
    refuse_second_callback,
    shows_summary,
    states_are_read,
)
from lightning_lora.training.compatibility.module_hooks import has_own, loads_in_hooks
from lightning_lora.training.compatibility.our_callbacks import (
    SET_BY_LIGHTNING,
    forget_module,
    late_callback_error,
    refuse_if_given_as_class,
    subclass_pytorch_lightning_too,
)
from lightning_lora.training.compatibility.precisions import keeping_adapters
from lightning_lora.training.compatibility.sharding import refuse_strategy
