"""What BasicSR 1.4.2 needs on today's stack: torch 2.6 and later, torchvision without old modules, no CUDA.

`install_shims` comes before anything imports BasicSR: it makes `import basicsr` possible. `patch_basicsr` then replaces
single functions of it, so that BasicSR's own `train_pipeline` and models run our YAML files, on CPUs too; each says
why. No file of an installed package is touched, and a second call does nothing.

Both run at the import of this package, not under `__main__`, because spawned data workers import everything again.
"""

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_reading import PlainLoader, load_torch_file

_LIBRARIES: list[torch.library.Library] = []  # kept alive: operators vanish with the object that defined them


def default_device() -> torch.device:
    """The device to compute on: the current CUDA device if there is one, the CPU otherwise."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def install_shims() -> None:
    """Make `import basicsr` possible, in half the time."""
    if 'torchvision' not in sys.modules:
        _define_torchvision_operators()
    with _called_later('torch._dynamo.utils', 'is_compile_supported'):
        _restore_functional_tensor()
    with _called_later('scipy.stats', 'multivariate_normal'):
        import basicsr  # noqa: F401
    _import_mmengine_in_turn()


@contextlib.contextmanager
def _called_later(module_name: str, function_name: str) -> Iterator[None]:
    """Let `from module import function` cost nothing; the first call of the function imports the module.

    torchvision and BasicSR each import a large module, seconds long, for one function that few runs call. Whatever else
    is asked of the module meanwhile is answered by the real one.
    """
    if module_name in sys.modules:
        yield
        return

    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module_name), function_name)(*args, **kwargs)

    def other(name: str) -> Any:
        if name.startswith('__'):  # the import machinery looks for a package's __path__
            raise AttributeError(name)
        sys.modules.pop(module_name, None)
        return getattr(importlib.import_module(module_name), name)

    stand_in = types.ModuleType(module_name)
    vars(stand_in).update({function_name: function, '__getattr__': other})
    sys.modules[module_name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(module_name) is stand_in:
            del sys.modules[module_name]


def _define_torchvision_operators() -> None:
    """Give torchvision the names of its compiled operators where they cannot be loaded.

    A CUDA build of torchvision (PyPI's wheel) beside a CPU-only torch cannot load its library; it then fails to import
    ("operator torchvision::nms does not exist") because it attaches shape functions to names that nobody defined.
    Names without a kernel are enough: BasicSR never calls these operators, and a call says that it has no kernel.
    """
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    for path in folder.glob('_C*'):
        with contextlib.suppress(OSError):
            torch.ops.load_library(path)  # torchvision loads it once more, which does nothing
            return
    source = (folder / '_meta_registrations.py').read_text(encoding='utf-8')
    library = torch.library.Library('torchvision', 'FRAGMENT')
    _LIBRARIES.append(library)
    for name in sorted(set(re.findall(r"""["']torchvision::(\w+)["']""", source))):
        library.define(f'{name}(Tensor input) -> Tensor')


def _restore_functional_tensor() -> None:
    """Bring back `torchvision.transforms.functional_tensor` (gone since 0.17), of which BasicSR wants one function."""
    from torchvision.transforms import functional

    name = 'torchvision.transforms.functional_tensor'
    shim = types.ModuleType(name, 'Stands in for the module that torchvision removed in 0.17; made by moeisr_basicsr.')
    shim.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]  # a module made by hand
    sys.modules.setdefault(name, shim)


def _import_mmengine_in_turn() -> None:
    """Import mmengine while no other process of this user does.

    Its yapf renames a grammar cache into place before the last bytes are written, the first time on a machine: of the
    processes of a torchrun, those that read it meanwhile would fail.
    """
    user = os.getuid() if hasattr(os, 'getuid') else ''
    with contextlib.suppress(OSError, Timeout), FileLock(Path(tempfile.gettempdir()) / f'mmengine-{user}.lock', 60):
        import mmengine.dist  # noqa: F401


def patch_basicsr() -> None:
    """Replace what fails in BasicSR, which this imports."""
    import basicsr.train
    import basicsr.utils.dist_util
    import basicsr.utils.img_util
    import basicsr.utils.options
    from basicsr.models.base_model import BaseModel

    if getattr(BaseModel, '_moeisr_patched', False):
        return
    BaseModel._moeisr_patched = True
    # Its loader reads `lr: 1e-4` as text, and runs code that a file holds.
    basicsr.utils.options.ordered_yaml = lambda: (PlainLoader, yaml.SafeDumper)
    for module in (basicsr.utils.dist_util, basicsr.utils.options):  # the second holds it by name
        module.init_dist = init_dist
    basicsr.train.load_resume_state = load_resume_state
    # All its models write through this module's cv2.
    basicsr.utils.img_util.cv2 = SimpleNamespace(**{**vars(cv2), 'imwrite': imwrite})
    BaseModel.__init__ = _on_available_device(BaseModel.__init__)
    BaseModel.model_to_device = _to_available_device(BaseModel.model_to_device)


def imwrite(file_path: str, image: np.ndarray, params: list[int] | None = None) -> bool:
    """`cv2.imwrite`, which crashes on a name that is no UTF-8, and leaves half a file on a full disk."""
    done, content = cv2.imencode(Path(file_path).suffix, image, params or [])
    write_atomic(file_path, lambda file: file.write(content.tobytes()))
    return done


def init_dist(launcher: str, backend: str | None = None, port: int | None = None, **kwargs: Any) -> None:
    """Start `torch.distributed` with or without CUDA; BasicSR's own asks for CUDA and nccl.

    Args:
        launcher: 'pytorch' (torchrun) or 'slurm'.
        backend: nccl with CUDA and gloo without, unless given; nccl is replaced by gloo where it cannot work.
        port: Of the master, for slurm. Default: MASTER_PORT or 29500.
        **kwargs: Passed to `torch.distributed.init_process_group`, for example `timeout`.

    Raises:
        UserError: Unknown launcher, or the launcher's environment variables are missing.
    """
    if launcher == 'slurm':
        _environment_from_slurm(port)
    elif launcher != 'pytorch':
        raise UserError(f"Unknown launcher '{launcher}': choose pytorch or slurm.")
    if missing := [key for key in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if key not in os.environ]:
        raise UserError(f'--launcher {launcher}: {", ".join(missing)} not set: start the command with torchrun.')
    if torch.cuda.is_available():
        # A worker forked after CUDA has started cannot use it, hence spawn, as in BasicSR. Without CUDA the platform's
        # default stays: a forked worker starts in milliseconds, a spawned one imports everything again.
        if mp.get_start_method(allow_none=True) is None:
            mp.set_start_method('spawn')
        # RANK counts over all machines, so it says nothing about this one's devices where machines differ.
        local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    usable = torch.cuda.is_available() and dist.is_nccl_available()
    if backend is None or (backend == 'nccl' and not usable):
        backend = 'nccl' if usable else 'gloo'
    dist.init_process_group(backend=backend, **kwargs)


def _environment_from_slurm(port: int | None) -> None:
    """Set torchrun's variables from slurm's, as BasicSR does, without a shell and without CUDA."""
    try:
        rank, tasks, nodes = (os.environ[f'SLURM_{key}'] for key in ('PROCID', 'NTASKS', 'NODELIST'))
        hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
    except KeyError as error:
        raise UserError(f'--launcher slurm: {error.args[0]} is not set: start the command with srun.') from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f'--launcher slurm: scontrol show hostnames failed: {error}.') from None
    os.environ.update(
        MASTER_ADDR=hosts.stdout.split()[0],
        MASTER_PORT=str(port or os.environ.get('MASTER_PORT', 29500)),
        WORLD_SIZE=tasks,
        RANK=rank,
        LOCAL_RANK=os.environ.get('SLURM_LOCALID', rank),
    )


def _on_available_device(init: Any) -> Any:
    """`BaseModel.__init__` that takes the CPU where `num_gpu` asks for a CUDA device that is not there."""

    @functools.wraps(init)
    def wrapper(self: Any, opt: dict[str, Any]) -> None:
        init(self, opt)
        if self.device.type == 'cuda' and not torch.cuda.is_available():
            from basicsr.utils import get_root_logger

            get_root_logger().warning(f'num_gpu is {opt["num_gpu"]} but there is no CUDA device: using the CPU.')
            self.device = torch.device('cpu')

    return wrapper


def _to_available_device(to_device: Any) -> Any:
    """`BaseModel.model_to_device` that leaves `device_ids` out on the CPU, where there must be none."""

    @functools.wraps(to_device)
    def wrapper(self: Any, net: nn.Module) -> nn.Module:
        if not self.opt['dist'] or self.device.type == 'cuda':
            return to_device(self, net)
        unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    return wrapper


def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """Read the training state that BasicSR's pipeline resumes from; None to start afresh.

    BasicSR's own asks for the current CUDA device, so CPU training could not resume. The state is read to the CPU;
    optimizers move it to where their parameters are.
    """
    from basicsr.utils import check_resume

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        folder = Path('experiments', opt['name'], 'training_states')  # below the current folder, as in BasicSR
        path = next((str(folder / f'{iteration}.state') for iteration in saved_iterations(folder)), None)
    if path is None:
        return None
    opt['path']['resume_state'] = path
    state = load_torch_file(path)
    check_resume(opt, state['iter'])
    return state


def saved_iterations(folder: Path) -> list[int]:
    """Iterations of the training states in a folder, newest first."""
    return sorted((int(file.stem) for file in folder.glob('*.state') if file.stem.isdigit()), reverse=True)
