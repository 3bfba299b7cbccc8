"""`test(opt)`: evaluate a network on every dataset of the options."""

from pathlib import Path

from basicsr.models import build_model
from basicsr.models.base_model import BaseModel

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment, kernel_name
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.models.evaluation import Evaluated, mean_row

from . import exit_codes
from .data_loading import evaluation_loaders
from .distributed import Ranks, launched, seed_everything
from .experiment import copy_options, make_folders, undo
from .logs import start_logger
from .signals import StopRequest

RESULTS_FILE = 'results.json'


def test(opt: dict) -> int:
    """Evaluate as the options say, images x scales shared among the ranks.

    Args:
        opt: BasicSR's options dict for testing; it is not changed.

    Returns:
        One of `exit_codes`.

    Raises:
        UserError: Options, data or weights do not fit.
    """
    with launched(opt.get('launcher', 'none'), opt.get('dist_params')) as ranks, StopRequest() as stop:
        return _test(opt, ranks, stop)


def _test(opt: dict, ranks: Ranks, stop: StopRequest) -> int:
    opt = {
        **opt,
        'rank': ranks.rank,
        'world_size': ranks.world_size,
        'dist': ranks.world_size > 1,
        'val': {'suffix': None, 'save_img': False, **(opt.get('val') or {})},
    }  # BasicSR's models expect both
    fresh = ranks.together(lambda: make_folders(opt, fresh=True))
    try:
        return _evaluate(opt, ranks, stop, [report for folder in fresh for report in folder.reports()])
    except Exception:
        if ranks.is_main:
            undo(fresh)
        raise


def _evaluate(opt: dict, ranks: Ranks, stop: StopRequest, reports: list[str]) -> int:
    logger = start_logger(opt, ranks, 'test')
    for report in reports:
        logger.warning(report)
    if ranks.is_main:
        copy_options(opt, opt['path']['results_root'])
    seed_everything(int(opt.get('manual_seed') or 0))
    loaders = evaluation_loaders(opt, ('test', 'val'))
    model = build_model({**opt, 'manual_seed': opt.get('manual_seed') or 0})
    save_img = opt['val']['save_img']
    if not hasattr(model, 'validate'):
        for loader in loaders:
            model.validation(loader, opt['name'], None, save_img)
        return exit_codes.OK
    results = model.validate(loaders, opt['name'], None, save_img, should_stop=lambda: bool(stop))
    if results is None:
        logger.warning('Testing was stopped by a signal; nothing was written.')
        return exit_codes.of_signal(ranks.largest(stop.signal))
    if ranks.is_main:
        path = Path(opt['path']['results_root']) / RESULTS_FILE
        schema.save(path, results_document(opt, model, results))
        logger.info(f'Results: {path}')
    return exit_codes.OK


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
            'parameters': parameters(net),
        }
    rows = [row for result in results for row in result.rows] + [mean_row(result.rows) for result in results]
    return schema.document('test', environment(kernel, model.device), rows, described)
