"""`test(opt)`: evaluate a network on every dataset of the options."""

from pathlib import Path
from typing import Any

from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.utils import set_random_seed
from torch.utils.data import DataLoader

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment, kernel_name
from moeisr_basicsr.errors import ExitCode
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.models.evaluation import Evaluated, mean_row

from .data_loading import evaluation_loaders
from .distributed import Ranks, launched
from .experiment import root_of, run_folders
from .logs import start_logger
from .run_lock import held
from .signals import StopRequest

RESULTS_FILE = 'results.json'


def test(opt: dict) -> int:
    """Evaluate as BasicSR's options dict says, images x scales shared among the ranks; the `ExitCode`.

    Raises:
        UserError: Options, data or weights do not fit.
    """
    with launched(opt) as ranks, held(root_of(opt), ranks), StopRequest() as stop:
        opt = ranks.options(opt)
        opt['manual_seed'] = int(opt.get('manual_seed') or 0)
        opt['val'] = {'suffix': None, 'save_img': False, **(opt.get('val') or {})}  # BasicSR's models expect both
        with run_folders(opt, ranks, fresh=True) as notes:
            return _test(opt, ranks, stop, notes)


def evaluate(
    model: BaseModel, loaders: list[DataLoader], current_iter: int | str, tensorboard: Any, opt: dict, stop: StopRequest
) -> list[Evaluated] | None:
    """Validate or test; the results, which BasicSR's own models do not give, or None after a request to stop."""
    save_img = opt['val'].get('save_img', False)
    if hasattr(model, 'validate'):
        return model.validate(loaders, current_iter, tensorboard, save_img, should_stop=lambda: bool(stop))
    for loader in loaders:
        model.validation(loader, current_iter, tensorboard, save_img)
    return []


def _test(opt: dict, ranks: Ranks, stop: StopRequest, notes: list[str]) -> int:
    """`test`; the log hears of `notes`."""
    logger = start_logger(opt, ranks, notes)
    set_random_seed(opt['manual_seed'])
    loaders = evaluation_loaders(opt, ('test', 'val'))
    model = build_model(opt)
    results = evaluate(model, loaders, opt['name'], None, opt, stop)
    if results is None:
        logger.warning('Testing was stopped by a signal; nothing was written.')
        return 128 + ranks.largest(stop.signal)
    if results and ranks.is_main:
        path = Path(opt['path']['results_root']) / RESULTS_FILE
        schema.save(path, results_document(opt, model, results))
        logger.info(f'Results: {path}')
    return ExitCode.OK


def results_document(opt: dict, model: BaseModel, results: list[Evaluated]) -> dict:
    """The rows of every image and, last, of every dataset; see `analysis.schema`."""
    net, described, kernel = model.get_bare_model(model.net_g), None, 'torch'
    if hasattr(net, 'decoder'):
        kernel = kernel_name(fused_backend(net.decoder, model.device, opt['val'].get('precision', 'fp32')))
        described = {
            'name': opt['name'],
            'file': opt['path'].get('pretrain_network_g'),
            'network_g': opt['network_g'],
            'parameters': parameters(net),
        }
    rows = [row for result in results for row in result.rows] + [mean_row(result.rows) for result in results]
    return schema.document('test', environment(kernel, model.device), rows, described)
