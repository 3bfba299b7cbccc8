"""Where numbers were measured."""
import os
import platform
from pathlib import Path

import torch

import moeisr_basicsr


def environment(device: torch.device | str = 'cpu', kernel: str = 'torch') -> dict:
    """The `environment` of a results document (see `schema`).

    Args:
        device: Where the network ran.
        kernel: Which code decoded: 'torch', or what a fused backend says of itself.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    return {
        'moeisr_basicsr': moeisr_basicsr.__version__, 'torch': torch.__version__, 'python': platform.python_version(),
        'platform': platform.platform(), 'cpu': cpu_name(), 'cpu_count': os.cpu_count() or 1,
        'threads': torch.get_num_threads(), 'device': device.type, 'device_name': name, 'kernel': kernel,
        # these change the speed of large temporaries and of threads
        'variables': {key: value for key, value in sorted(os.environ.items())
                      if key.startswith(('OMP_', 'MKL_', 'MALLOC_', 'MOEISR_'))},
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
