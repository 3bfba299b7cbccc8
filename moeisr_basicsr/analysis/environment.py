"""Where numbers were measured."""

import os
import platform
from pathlib import Path

import torch

import moeisr_basicsr
from moeisr_basicsr.core.render import TORCH

VARIABLES = ('OMP_', 'MKL_', 'MALLOC_', 'MOEISR_')  # they change the speed of threads and of large temporaries


def environment(kernel: str, device: torch.device | str = 'cpu') -> dict:
    """The `environment` of a results document (see `schema`).

    Args:
        kernel: Which code decoded, see `kernel_name`; 'none' where nothing was decoded.
        device: Where the network ran.
    """
    device = torch.device(device)
    return {
        'moeisr_basicsr': moeisr_basicsr.__version__,
        'torch': torch.__version__,
        'python': platform.python_version(),
        'platform': platform.platform(),
        'cpu': cpu_name(),
        'cpu_count': os.cpu_count() or 1,
        'threads': torch.get_num_threads(),
        'device': device.type,
        'device_name': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'kernel': kernel,
        'variables': {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
    }


def kernel_name(backend: object | None) -> str:
    """Which code decodes: 'torch', or the class of the fused backend (`kernels.fused_backend`)."""
    return 'torch' if backend is None or backend is TORCH else type(backend).__name__


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path('/proc/cpuinfo')  # Linux; elsewhere `platform` knows
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return (names or [platform.processor() or platform.machine()])[0]
