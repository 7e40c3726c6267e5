"""A class is combined once, in whichever thread."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from lightning_lora.tensors.inplace import InPlace, combined


def test_threads_that_combine_the_same_classes_get_one_class() -> None:
    both = Barrier(2)

    class Loud(InPlace):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            both.wait()  # both threads are making the class now

    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(combined, Loud, dict) for _ in range(2))
    assert one.result() is other.result() is combined(Loud, dict)
