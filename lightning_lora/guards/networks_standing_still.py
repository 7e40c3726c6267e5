"""Networks that stand still beside others that train, and get no adapters; and copies, which other code moves."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import warn
from lightning_lora.model.still.find_still import about_networks_left_out
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.networks.copies import pairs_of


class NetworksStandingStill(Guard):
    """Names networks that were found beside those that train."""

    def injected_by_call(self, view: View) -> None:
        """Name those that stand still."""
        still = view.adapter.networks.beside_training
        if still:
            warn(about_networks_left_out(still, view.title))

    def training_begins(self, view: View) -> None:
        """Name those that stand still, and copies."""
        networks = view.adapter.networks
        if networks.beside_training:
            rank_zero_info(
                about_networks_left_out(networks.beside_training, view.title)
            )
        if networks.copies:
            rank_zero_info(_about_copies(view))


def _about_copies(view: View) -> str:
    return (
        f"Copies in {view.title}: {pairs_of(view.adapter.networks.copies)}. A copy "
        "gets the same adapters, for other code to move. If that uses lerp_, frozen "
        "weights stay as they are; other formulas round them, and files hold them "
        "whole."
    )
