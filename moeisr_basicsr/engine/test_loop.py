"""`test(opt)`: evaluate a network on every dataset of the options."""

from pathlib import Path

from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.utils import set_random_seed

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment, kernel_name
from moeisr_basicsr.errors import ExitCode
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.models.evaluation import Evaluated, mean_row

from .data_loading import evaluation_loaders
from .distributed import Ranks, launched
from .experiment import run_folders
from .logs import start_logger
from .signals import StopRequest

RESULTS_FILE = 'results.json'


def test(opt: dict) -> int:
    """Evaluate as the options say, images x scales shared among the ranks.

    Args:
        opt: BasicSR's options dict for testing; it is not changed.

    Returns:
        An exit code, see `ExitCode`.

    Raises:
        UserError: Options, data or weights do not fit.
    """
    with launched(opt) as ranks, StopRequest() as stop:
        opt = ranks.options(opt)
        opt['manual_seed'] = int(opt.get('manual_seed') or 0)
        opt['val'] = {'suffix': None, 'save_img': False, **(opt.get('val') or {})}  # BasicSR's models expect both
        with run_folders(opt, ranks, fresh=True) as notes:
            return _evaluate(opt, ranks, stop, notes)


def _evaluate(opt: dict, ranks: Ranks, stop: StopRequest, notes: list[str]) -> int:
    logger = start_logger(opt, ranks, notes)
    set_random_seed(opt['manual_seed'])
    loaders = evaluation_loaders(opt, ('test', 'val'))
    model = build_model(opt)
    save_img = opt['val']['save_img']
    if not hasattr(model, 'validate'):
        for loader in loaders:
            model.validation(loader, opt['name'], None, save_img)
        return ExitCode.OK
    results = model.validate(loaders, opt['name'], None, save_img, should_stop=lambda: bool(stop))
    if results is None:
        logger.warning('Testing was stopped by a signal; nothing was written.')
        return 128 + ranks.largest(stop.signal)
    if ranks.is_main:
        path = Path(opt['path']['results_root']) / RESULTS_FILE
        schema.save(path, results_document(opt, model, results))
        logger.info(f'Results: {path}')
    return ExitCode.OK


def results_document(opt: dict, model: BaseModel, results: list[Evaluated]) -> dict:
    """The results of every image and, last, the means of every dataset; see `analysis.schema`."""
    net = model.get_bare_model(model.net_g)
    described, kernel = None, 'torch'
    if hasattr(net, 'decoder'):
        kernel = kernel_name(fused_backend(net.decoder, model.device, opt['val'].get('precision', 'fp32')))
        described = {
            'name': opt['name'],
            'file': opt['path'].get('pretrain_network_g'),
            'network_g': opt['network_g'],
            'parameters': parameters(net)._asdict(),
        }
    rows = [row for result in results for row in result.rows] + [mean_row(result.rows) for result in results]
    return schema.document('test', environment(kernel, model.device), rows, described)
