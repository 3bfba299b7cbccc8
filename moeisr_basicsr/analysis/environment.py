"""Where numbers were measured."""

import os
import platform
from pathlib import Path

import torch

import moeisr_basicsr
from moeisr_basicsr.core.render import TORCH


def environment(kernel: str, device: torch.device | str = 'cpu') -> dict:
    """The `environment` of a results document (see `schema`).

    Args:
        kernel: Which code decoded, see `kernel_name`; 'none' where nothing was decoded.
        device: Where the network ran.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    return {
        'moeisr_basicsr': moeisr_basicsr.__version__,
        'torch': torch.__version__,
        'python': platform.python_version(),
        'platform': platform.platform(),
        'cpu': cpu_name(),
        'cpu_count': os.cpu_count() or 1,
        'threads': torch.get_num_threads(),
        'device': device.type,
        'device_name': name,
        'kernel': kernel,
        # these change the speed of large temporaries and of threads
        'variables': {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(('OMP_', 'MKL_', 'MALLOC_', 'MOEISR_'))
        },
    }


def kernel_name(backend: object | None) -> str:
    """Which code decodes: 'torch', or the class of the fused backend (`kernels.fused_backend`)."""
    return 'torch' if backend is None or backend is TORCH else type(backend).__name__


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
