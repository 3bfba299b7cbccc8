"""What BasicSR 1.4.2 needs on today's stack: torch 2.1 to 2.13 and later, numpy 2, machines without CUDA.

Two steps, both safe to repeat, neither touches a file of the installed packages:

- `install_shims` must run before anything imports BasicSR: it makes `import basicsr` possible. It runs at the import
  of this package (not under `__main__`), because spawned data workers import everything again.
- `patch_basicsr` replaces single functions of the imported BasicSR. Each replacement says why it is needed.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.safe_reading import load_torch_file, ordered_yaml, parse_yml_value

# Owners of `torch.library` definitions must stay alive: the operators vanish with the object that defined them.
_LIBRARIES = []
_ASSIGNMENT = re.compile(r'opt((?:\["[^"\\\[\]]*"\])+)=value')
# Every module of BasicSR 1.4.2 that calls `torch.load`.
_LOADING_MODULES = (
    'basicsr.models.base_model',
    'basicsr.train',
    *(
        f'basicsr.archs.{name}'
        for name in ('basicvsr_arch', 'dfdnet_arch', 'inception', 'spynet_arch', 'tof_arch', 'vgg_arch')
    ),
)


def default_device():
    """The `torch.device` to compute on: the current CUDA device if there is one, the CPU otherwise."""
    import torch

    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def install_shims() -> None:
    """Make `import basicsr` possible. Call it before anything imports BasicSR; a second call does nothing."""
    _define_torchvision_operators()
    _restore_functional_tensor()


def _define_torchvision_operators() -> None:
    """Give torchvision the names of its compiled operators where they cannot be loaded.

    A CUDA build of torchvision (PyPI's wheel) beside a CPU-only torch cannot load its library; it then fails to import
    ("operator torchvision::nms does not exist") because it attaches shape functions to names that nobody defined.
    Names without a kernel are enough: BasicSR never calls these operators, and a call says that it has no kernel.
    """
    import torch

    if _LIBRARIES or 'torchvision' in sys.modules or torch.version.cuda or getattr(torch.version, 'hip', None):
        return
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    registrations = folder / '_meta_registrations.py'
    if not registrations.is_file() or _loads(folder):
        return
    source = registrations.read_text(encoding='utf-8')
    library = torch.library.Library('torchvision', 'FRAGMENT')
    _LIBRARIES.append(library)
    for name in sorted(set(re.findall(r"""["']torchvision::(\w+)["']""", source))):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f'{name}(Tensor input) -> Tensor')


def _loads(folder: Path) -> bool:
    """Whether torchvision's compiled library loads beside this torch; if so it is loaded, which torchvision repeats."""
    import torch

    for path in (path for ending in ('so', 'pyd', 'dylib') for path in folder.glob(f'_C*.{ending}')):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(path))
            return True
    return False


def _restore_functional_tensor() -> None:
    """Bring back `torchvision.transforms.functional_tensor` (gone since 0.17), of which BasicSR wants one function."""
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules:
        return
    from torchvision import transforms

    if importlib.util.find_spec(name) is not None:
        with warnings.catch_warnings():  # 0.15 and 0.16 have it, and warn about it
            warnings.simplefilter('ignore')
            importlib.import_module(name)
        return
    shim = types.ModuleType(name, 'Stands in for the module that torchvision removed in 0.17; made by moeisr_basicsr.')
    shim.rgb_to_grayscale = transforms.functional.rgb_to_grayscale
    sys.modules[name] = shim
    transforms.functional_tensor = shim


def patch_basicsr() -> None:
    """Replace what fails or is unsafe in BasicSR, which this imports; a second call does nothing."""
    install_shims()
    from basicsr.models.base_model import BaseModel

    if getattr(BaseModel, '_moeisr_patched', False):
        return
    _patch_options()
    _patch_distributed()
    _patch_devices(BaseModel)
    _patch_loading()
    _patch_jpeg()
    BaseModel._moeisr_patched = True


def _patch_options() -> None:
    """YAML and `--force_yml` without `exec` and `eval`: a stranger's file or command must not run code."""
    options = importlib.import_module('basicsr.utils.options')
    options.ordered_yaml = ordered_yaml
    options._postprocess_yml_value = parse_yml_value
    # `parse_options` builds 'opt["a"]["b"]=value' and calls exec. The module's own name comes before the built-in one.
    options.exec = _assign_option


def _assign_option(statement: str) -> None:
    """Do what BasicSR's `exec('opt["a"]["b"]=value')` means, and nothing else that such a string could say."""
    caller = sys._getframe(1).f_locals
    match = _ASSIGNMENT.fullmatch(statement)
    if match is None:
        raise UserError(f'--force_yml {caller.get("entry")}: write key:key=value with plain key names.')
    *parents, last = re.findall(r'\["([^"]*)"\]', match.group(1))
    node = caller['opt']
    for key in parents:
        if not isinstance(node, dict) or key not in node:
            known = list(node) if isinstance(node, dict) else []
            raise UserError(
                f"--force_yml {caller.get('entry')}: the options have no key '{key}'.{did_you_mean(key, known)}"
            )
        node = node[key]
    if not isinstance(node, dict):
        raise UserError(f"--force_yml {caller.get('entry')}: '{parents[-1]}' is a value, it has no key '{last}'.")
    node[last] = caller['value']


def _patch_distributed() -> None:
    """`init_dist` needs CUDA and nccl; `basicsr.utils.options` holds it by name, so it is replaced there too."""
    for module in ('basicsr.utils.dist_util', 'basicsr.utils', 'basicsr.utils.options'):
        module = importlib.import_module(module)
        if hasattr(module, 'init_dist'):
            module.init_dist = init_dist


def init_dist(launcher: str, backend: str | None = None, port: int | None = None, **kwargs) -> None:
    """Start `torch.distributed` with or without CUDA.

    Args:
        launcher: 'pytorch' (torchrun) or 'slurm'.
        backend: nccl with CUDA and gloo without, unless given; nccl is replaced by gloo where it cannot work.
        port: Of the master, for slurm. Default: MASTER_PORT or 29500.
        **kwargs: Passed to `torch.distributed.init_process_group`, for example `timeout`.

    Raises:
        UserError: Unknown launcher, or the launcher's environment variables are missing.
    """
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp

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
    except KeyError as error:
        raise UserError(f'--launcher slurm: {error.args[0]} is not set: start the command with srun.') from None
    try:
        hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f'--launcher slurm: scontrol show hostnames {nodes} failed: {error}.') from None
    if port is not None:
        os.environ['MASTER_PORT'] = str(port)
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ.update(
        MASTER_ADDR=hosts.stdout.split()[0],
        WORLD_SIZE=tasks,
        RANK=rank,
        LOCAL_RANK=os.environ.get('SLURM_LOCALID', rank),
    )


def _patch_devices(base_model: type) -> None:
    """Replace the places that ask for a CUDA device without looking whether there is one."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    init, to_device = base_model.__init__, base_model.model_to_device

    @functools.wraps(init)
    def init_on_available_device(self, opt):
        init(self, opt)
        if self.device.type == 'cuda' and not torch.cuda.is_available():
            from basicsr.utils import get_root_logger

            get_root_logger().warning(f'num_gpu is {opt["num_gpu"]} but there is no CUDA device: using the CPU.')
            self.device = torch.device('cpu')

    @functools.wraps(to_device)
    def model_to_available_device(self, net):
        if not self.opt['dist'] or self.device.type == 'cuda':
            return to_device(self, net)
        # The original passes device_ids=[current CUDA device]; on the CPU there must be none.
        return DistributedDataParallel(
            net.to(self.device), find_unused_parameters=self.opt.get('find_unused_parameters', False)
        )

    base_model.__init__, base_model.model_to_device = init_on_available_device, model_to_available_device
    train = importlib.import_module('basicsr.train')
    cuda_prefetcher, cpu_prefetcher = train.CUDAPrefetcher, train.CPUPrefetcher

    def prefetcher(loader, opt):
        """`prefetch_mode: cuda` opens a CUDA stream; without CUDA the same batches come from the CPU prefetcher."""
        return cuda_prefetcher(loader, opt) if torch.cuda.is_available() else cpu_prefetcher(loader)

    train.CUDAPrefetcher, train.load_resume_state = prefetcher, load_resume_state


def load_resume_state(opt: dict) -> dict | None:
    """Find and read the training state to resume from, or None to start afresh.

    BasicSR's own asks for the current CUDA device, so CPU training could not resume. The state is read to the CPU;
    optimizers move it to where their parameters are.
    """
    from basicsr.utils import check_resume

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:  # looks below the current folder only, as in BasicSR
        folder = Path('experiments', opt['name'], 'training_states')
        states = [state for state in folder.glob('*.state') if state.stem.isdigit()]
        path = str(max(states, key=lambda state: int(state.stem))) if states else None
    if path is None:
        return None
    opt['path']['resume_state'] = path
    state = load_torch_file(path)
    check_resume(opt, state['iter'])
    return state


def _patch_loading() -> None:
    """Read weights and states with `weights_only`: before torch 2.6 `torch.load` runs whatever code a file holds."""
    import torch

    class TorchWithSafeLoad(types.ModuleType):
        """`torch`, except that `load` never unpickles code. Seen by BasicSR's modules only."""

        load = staticmethod(functools.partial(load_torch_file, map_location=None))

        def __getattr__(self, name):
            return getattr(torch, name)

    safe_torch = TorchWithSafeLoad('torch')
    for name in _LOADING_MODULES:
        importlib.import_module(name).torch = safe_torch
    importlib.import_module('basicsr.archs.inception').load_url = _load_url


def _load_url(url: str, progress: bool = True) -> Any:
    """`torch.hub.load_state_dict_from_url` with `weights_only` on every torch."""
    import torch

    path = Path(torch.hub.get_dir(), 'checkpoints', url.rpartition('/')[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=progress)
    return load_torch_file(path)


def _patch_jpeg() -> None:
    """OpenCV 4.12 and later refuse a JPEG quality that is not an integer; BasicSR draws a float."""
    degradations = importlib.import_module('basicsr.data.degradations')
    original = degradations.add_jpg_compression

    @functools.wraps(original)
    def add_jpg_compression(img, quality=90):
        return original(img, int(quality))

    degradations.add_jpg_compression = add_jpg_compression
