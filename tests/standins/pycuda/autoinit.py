"""Makes a context of its own current when imported, as pycuda's module does."""

import atexit

from pycuda import driver

driver.init()
device = driver.Device(0)
context = device.make_context()


def _finish_up() -> None:
    driver.Context.pop()


atexit.register(_finish_up)
