"""What depends on the versions of torch and Lightning."""

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
from packaging.version import Version

keeps_random = Version(L.__version__) >= Version("2.6")
exact = pytest.mark.skipif(
    not keeps_random, reason="Lightning itself does not restore the random numbers"
)
needs_averaging = pytest.mark.skipif(
    not hasattr(bundled, "EMAWeightAveraging"),
    reason="Lightning 2.6 brought weight averaging",
)
