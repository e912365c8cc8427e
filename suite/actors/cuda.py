"""Whether this process has initialised CUDA: from then on it sees the GPUs of that moment, and holds memory of one."""

import ctypes

LIBRARY = "libcuda.so.1"
CUDA_ERROR_NOT_INITIALIZED = 3  # what the driver's functions answer before cuInit


def cuda_is_initialised() -> bool:
    """Asks the driver, which also knows of what torch does not: counting GPUs may initialise it. Changes nothing."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:  # there is no driver
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != CUDA_ERROR_NOT_INITIALIZED
