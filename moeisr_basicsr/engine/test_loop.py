"""`test(opt)`: evaluate a network on every dataset of the options."""

from pathlib import Path
from typing import Any

from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger, set_random_seed
from torch.utils.data import DataLoader

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment, kernel_name
from moeisr_basicsr.errors import ExitCode, ImageError
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.models.evaluation import Evaluated, Journal, mean_row

from .data_loading import evaluation_loaders
from .distributed import Ranks, launched
from .experiment import root_of, run_folders
from .logs import start_logger
from .run_lock import held
from .signals import StopRequest
from .test_progress import Found, Progress, find_progress

RESULTS_FILE = 'results.json'


def test(opt: dict) -> int:
    """Evaluate as BasicSR's options dict says, images x scales shared among the ranks; the `ExitCode`.

    Each dataset's rows are written when it is done. An interrupted test of the same name, weights and options goes on
    where it was; so does one with images that could not be used.

    Raises:
        UserError: Options, data or weights do not fit.
    """
    with launched(opt) as ranks, held(root_of(opt), ranks), StopRequest() as stop:
        opt = ranks.options(opt)
        opt['manual_seed'] = int(opt.get('manual_seed') or 0)
        opt['val'] = {'suffix': None, 'save_img': False, **(opt.get('val') or {})}  # BasicSR's models expect both
        found = ranks.together(lambda: find_progress(opt))
        with run_folders(opt, ranks, fresh=not found.rows) as notes:
            return _test(opt, ranks, stop, found._replace(notes=found.notes + notes))


def evaluate(
    model: BaseModel,
    loaders: list[DataLoader],
    current_iter: int | str,
    tensorboard: Any,
    opt: dict,
    stop: StopRequest,
    journal: Journal | None = None,
) -> list[Evaluated] | None:
    """Validate or test; the results, which BasicSR's own models do not give, or None after a request to stop."""
    save_img = opt['val'].get('save_img', False)
    if hasattr(model, 'validate'):
        return model.validate(loaders, current_iter, tensorboard, save_img, lambda: bool(stop), journal)
    for loader in loaders:
        try:
            model.validation(loader, current_iter, tensorboard, save_img)
        except ImageError as error:
            if not opt['is_train']:
                raise
            get_root_logger().error(f'A dataset could not be validated: {error}')
    return []


def _test(opt: dict, ranks: Ranks, stop: StopRequest, found: Found) -> int:
    """`test`; the log hears of what was found."""
    logger = start_logger(opt, ranks, found.notes)
    set_random_seed(opt['manual_seed'])
    loaders = evaluation_loaders(opt, ('test', 'val'))
    model = build_model(opt)
    path = Path(opt['path']['results_root']) / RESULTS_FILE

    def save(results: list[Evaluated]) -> None:
        if ranks.is_main:
            schema.save(path, results_document(opt, model, results))

    progress = Progress(opt, ranks, found, save)
    results = evaluate(model, loaders, opt['name'], None, opt, stop, progress)
    if results is None:
        logger.warning(f'Testing was stopped by a signal; the same command goes on where it was. Results: {path}')
        return 128 + ranks.largest(stop.signal)
    if any(result.failed for result in results):
        logger.error(f'Some images could not be used; the same command tries them again. Results: {path}')
        return ExitCode.IMAGES_FAILED
    if results:
        ranks.together(progress.remove)
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
    rows = [row for result in results for row in (*result.rows, *failed_rows(result))]
    rows += [{**mean_row(result.rows), **left_out(result)} for result in results if result.rows]
    return schema.document('test', environment(kernel, model.device), rows, described)


def failed_rows(result: Evaluated) -> list[dict]:
    """The rows of images that could not be used."""
    about = {'case': 'failed', 'dataset': result.dataset}
    return [{**about, 'image': image, 'notes': reason} for image, reason in result.failed.items()]


def left_out(result: Evaluated) -> dict:
    """What the mean row says of such images."""
    if not result.failed:
        return {}
    number, images = len(result.failed), ', '.join(result.failed)
    return {'failed': number, 'notes': f'without {number} of {result.count + number} images: {images}'}
