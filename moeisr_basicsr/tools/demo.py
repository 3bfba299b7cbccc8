"""The page of `basicsr demo`: what it shows, as functions that need no browser, and its layout in gradio.

A picture is encoded once; the sliders only render it anew, at any size and cost weight (`inference.encode_whole`).

Shapes: (H, W) input, (R, S) output, J experts; pictures are (R, S, 3) RGB uint8.
"""

import contextlib
import math
import os
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.analysis.measure import StageClock, time_ms
from moeisr_basicsr.analysis.pictures import bicubic, expert_colours
from moeisr_basicsr.analysis.routing_stats import expert_shares, mean_cost
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.data.arbitrary_scale_dataset import EPS_FLOOR
from moeisr_basicsr.data.image_reader import read_header, read_image, to_float
from moeisr_basicsr.data.image_writer import to_unsigned
from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import Window, encode_whole, target_size, upscale_strips
from moeisr_basicsr.metrics.psnr_ssim_sr_metric import calculate_psnr_sr

MAX_INPUT, MAX_OUTPUT = 2**20, 2**23  # pixels: seconds on a CPU, and what a browser still moves smoothly
MAX_FACTOR, FIRST_FACTOR = 12.0, 3.0
KEPT_VIEWS = 8  # whose pictures are not deleted yet: another tab may show them
INSTEAD = 'the command basicsr upscale has no such limit.'
CSS = """
.plain, .plain tr, .plain td { border: 0 !important }
.plain td { padding: 2px 16px 2px 0 !important }
.plain tr:first-child { opacity: 0.7 }
.swatch { display: inline-block; width: 1em; height: 1em; border-radius: 2px; vertical-align: middle }
"""
INTRODUCTION = """\
# Enlarge a picture by any factor
Put in a small picture, move the factor, and drag the handle to compare. The astronaut is an example."""
ABOUT_MAP = (
    'Several decoders, the experts, share the pixels: cheap ones take flat areas, expensive ones edges and detail.'
)
ABOUT_COST = 'To the right, more pixels go to cheaper experts (cost weight).'
ABOUT_TRUTH = 'Give the large original of your picture, or shrink one here.'


class Source(NamedTuple):
    """A picture that has been encoded."""

    lq: Tensor  # (1, 3, H, W) RGB in [0, 1]
    encoded: Window
    time_ms: float  # of the encoder


class View(NamedTuple):
    """What the page shows of a picture at one position of the sliders."""

    image: np.ndarray  # (R, S, 3)
    bicubic: np.ndarray  # (R, S, 3)
    overlay: np.ndarray | None  # (R, S, 3), the expert map over the picture; None for one expert
    shares: list[float]  # of the experts, J
    cost: float  # mean multiply-adds of the chosen expert over the most expensive one's
    time_ms: dict[str, float]  # 'encode' (once per picture), 'map', 'decode', 'bicubic'
    psnr: tuple[float, float] | None  # dB of luma: bicubic's, the network's; None without a truth of this size
    truth_factor: str  # of a truth of another size


def read_picture(path: str | Path, most: int = MAX_INPUT) -> np.ndarray:
    """A file that is not too large for the page: (H, W, 3) uint8 or uint16, without its transparency.

    Raises:
        UserError: See `read_image`; there are more than `most` pixels.
    """
    name = Path(path).name
    header = read_header(path, name)
    if header.height * header.width > most:
        raise UserError(
            f'{name} has {header.width} x {header.height} pixels; this page takes {most / 2**20:g} million. '
            f'Shrink or crop it first; {INSTEAD}'
        )
    return read_image(path, name).rgb


def as_tensor(rgb: np.ndarray) -> Tensor:
    """(R, S, 3) unsigned -> (3, R, S) in [0, 1]."""
    return torch.from_numpy(to_float(rgb)).permute(2, 0, 1)


def encode(net: MoEISR, rgb: np.ndarray, precision: str = 'fp32') -> Source:
    """The part of the work that no slider changes."""
    lq, results = as_tensor(rgb)[None].to(next(net.parameters()).device), []
    took = time_ms(lambda: results.append(encode_whole(net, lq, precision)), lq.device)
    return Source(lq, results[0], took)


def output_size(lq_size: tuple[int, int], factor: float, truth_size: tuple[int, int] | None) -> tuple[int, int]:
    """(R, S) at a factor; exactly that of the truth where the factor is the slider's nearest to it.

    Raises:
        UserError: More than `MAX_OUTPUT` pixels.
    """
    size = target_size(lq_size, factor, None)
    if size[0] * size[1] > MAX_OUTPUT:
        most = math.floor(math.sqrt(MAX_OUTPUT / (lq_size[0] * lq_size[1])) * 10) / 10
        raise UserError(
            f'x{factor:g} makes {size[1]} x {size[0]} pixels; this page stops at {MAX_OUTPUT / 2**20:g} million. '
            f'Choose a factor of at most {most:g} for this picture; {INSTEAD}'
        )
    if truth_size is not None and all(abs(r / n - factor) <= 0.05 + 1e-9 for r, n in zip(truth_size, lq_size)):
        return truth_size
    return size


def render(
    net: MoEISR,
    source: Source,
    factor: float,
    cost_weight: float = 0.0,
    truth: np.ndarray | None = None,
    precision: str = 'fp32',
) -> View:
    """The picture at a factor and a cost weight, and what it took.

    Raises:
        UserError: See `output_size`.
    """
    height, width = source.lq.shape[-2:]
    size = output_size((height, width), factor, None if truth is None else (truth.shape[0], truth.shape[1]))
    clock = StageClock(source.lq.device)
    cost_weight = cost_weight if net.num_experts > 1 else 0.0
    strips = list(
        upscale_strips(net, source.lq, size, cost_weight, precision=precision, clock=clock, encoded=source.encoded)
    )
    image = torch.cat([strip.image for strip in strips], dim=1).cpu()  # (3, R, S)
    start = time.perf_counter()
    smooth = bicubic(source.lq[0].cpu(), size)
    took = {'encode': source.time_ms, **clock.times, 'bicubic': (time.perf_counter() - start) * 1e3}
    psnr, factor_there = None, ''
    if truth is not None and truth.shape[:2] != size:
        rows, cols = truth.shape[0] / height, truth.shape[1] / width
        factor_there = f'x{rows:.3g}' if abs(rows - cols) < 0.05 else f'x{rows:.3g} in rows and x{cols:.3g} in columns'
    elif truth is not None:
        target, scale = as_tensor(truth), (size[0] / height, size[1] / width)
        psnr = (calculate_psnr_sr(smooth, target, scale), calculate_psnr_sr(image, target, scale))
    pixels, overlay, shares = to_picture(image), None, [1.0]
    if net.num_experts > 1:
        expert_map = torch.cat([strip.expert_map for strip in strips if strip.expert_map is not None]).cpu()
        shares = expert_shares(expert_map, net.num_experts)
        overlay = overlaid(pixels, expert_map.numpy(), net.expert_costs.tolist())
    return View(
        pixels, to_picture(smooth), overlay, shares, mean_cost(shares, net.expert_costs), took, psnr, factor_there
    )


def to_picture(image: Tensor) -> np.ndarray:
    """(3, R, S) float -> (R, S, 3) uint8."""
    return to_unsigned(image.permute(1, 2, 0).numpy())


def overlaid(pixels: np.ndarray, expert_map: np.ndarray, costs: list[float]) -> np.ndarray:
    """A picture in grey, (R, S, 3), under the colours of its experts, (R, S)."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    colours = expert_colours(len(costs), costs)[:, ::-1]  # RGB
    return cv2.addWeighted(np.repeat(grey, 3, axis=2), 0.5, colours[expert_map], 0.5, 0)


def shrink(rgb: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """A small picture made of a large one as the benchmarks do it, and the part of the large one that it shows.

    Raises:
        UserError: Nothing would be left.
    """
    size = [math.floor(n / factor + EPS_FLOOR) for n in rgb.shape[:2]]
    if min(size) < 16:
        raise UserError(f'The original has {rgb.shape[1]} x {rgb.shape[0]} pixels, too few to shrink it by {factor:g}.')
    rows, cols = target_size((size[0], size[1]), factor, None)
    truth = np.ascontiguousarray(rgb[:rows, :cols])
    return imresize(truth, (size[0], size[1])), truth


def legend(net: MoEISR, view: View) -> str:
    """The experts from cheapest to most expensive, with colour, cost and share, as HTML."""
    costs = net.expert_costs.tolist()
    colours = expert_colours(len(costs), costs)[:, ::-1].tolist()  # RGB
    rows = [('', 'expert', 'work per pixel', 'share of the pixels')]
    order = np.argsort(costs, kind='stable').tolist()
    for place, expert in enumerate(order):
        name = 'cheapest' if place == 0 else 'most expensive' if expert == order[-1] else ''
        swatch = f'<span class="swatch" style="background:rgb({",".join(map(str, colours[expert]))})"></span>'
        rows.append((swatch, name, percent(costs[expert]), percent(view.shares[expert])))
    return f'<p>{ABOUT_MAP}</p>{table(rows)}'


def facts(net: MoEISR, view: View) -> str:
    """Quality, work and time as HTML, the network's beside bicubic's."""
    took = view.time_ms
    rest = sum(took.get(stage, 0.0) for stage in ('map', 'decode'))
    rows = [('', 'bicubic', 'network')]
    if view.psnr is not None:
        gain = view.psnr[1] - view.psnr[0]
        better = f'<b>{view.psnr[1]:.2f} dB</b> ({gain:+.2f})'
        rows.append(('PSNR (higher is closer)', f'{view.psnr[0]:.2f} dB', better))
    elif view.truth_factor:
        rows.append(('PSNR', '', f'only at the size of the original, {view.truth_factor}'))
    rows.append(('time', f'{took["bicubic"]:.0f} ms', f'{rest:.0f} ms; once per picture {took["encode"]:.0f} ms more'))
    if net.num_experts > 1:
        rows.append(('work of the experts', '', f'{percent(view.cost)} of the most expensive one for every pixel'))
    height, width = view.image.shape[:2]
    return f'<p>{width} x {height} pixels</p>{table(rows)}'


def percent(share: float) -> str:
    """With two digits where it is small."""
    return f'{100 * share:.2g} %' if share < 0.1 else f'{share:.0%}'.replace('%', ' %')


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """An HTML table; the first row is its head."""
    lines = (''.join(f'<td>{cell}</td>' for cell in row) for row in rows)
    return f'<table class="plain">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def example() -> np.ndarray:
    """A photograph that comes with scikit-image, which BasicSR needs: the original of the first view."""
    from skimage import data

    return data.astronaut()[:330, 60:420]


class Page:
    """The page's functions, on files; gradio calls one at a time.

    Args:
        net: In eval mode.
        folder: For pictures; gradio's folder, which it serves.
        precision: Of encoder and experts.
    """

    def __init__(self, net: MoEISR, folder: Path, precision: str):
        self.net, self.folder, self.precision = net, folder, precision
        self.views: deque[Path] = deque()  # folders
        # The last picture only: features of a large one take hundreds of megabytes.
        self.source = lru_cache(maxsize=1)(lambda path: encode(net, read_picture(path), precision))

    def save(self, **pictures: np.ndarray) -> list[str]:
        """PNGs, written fast, in a folder of their own: browsers keep what an address once was."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        paths = [str(folder / f'{name}.png') for name in pictures]
        for path, picture in zip(paths, pictures.values()):
            cv2.imwrite(path, picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        return paths

    def show(self, picture: str | None, factor: float, cost_weight: float, truth: str | None) -> tuple:
        """The values of comparison, facts, expert map, legend and download."""
        if picture is None:
            return None, '', None, '', None
        original = None if truth is None else read_picture(truth, MAX_OUTPUT)
        view = render(self.net, self.source(picture), factor, cost_weight, original, self.precision)
        result = f'{Path(picture).stem}_x{factor:g}'
        experts = {} if view.overlay is None else {'experts': view.overlay}
        before, after, *overlay = self.save(**{'bicubic': view.bicubic, result: view.image, **experts})
        self.views.append(Path(after).parent)
        if len(self.views) > KEPT_VIEWS:
            shutil.rmtree(self.views.popleft())
        return (before, after), facts(self.net, view), overlay[0] if overlay else None, legend(self.net, view), after

    def shrink(self, picture: str | None, factor: float, truth: str | None) -> list[str]:
        """The values of picture and original: the original, or else the picture, and what is left of it."""
        path = truth or picture
        if path is None:
            raise UserError('Put a picture in first.')
        small, original = shrink(to_unsigned(read_picture(path, MAX_OUTPUT)), factor)
        return self.save(small=small, original=original)

    def layout(self, name: str) -> Any:
        """The page as gradio's Blocks; it opens with the example, shrunk, so that there is something to see."""
        import gradio as gr

        def told(function: Callable) -> Callable:
            """What was there stays, under a line that says why."""

            def wrapped(*args: Any) -> Any:
                try:
                    return function(*args)
                except UserError as error:
                    gr.Warning(str(error), duration=20, title='Not on this page')
                    return gr.skip()

            return wrapped

        small, original = shrink(example(), FIRST_FACTOR)
        render(self.net, encode(self.net, small), FIRST_FACTOR)  # builds the kernels, so that no visitor waits for them
        first = self.save(astronaut=small, original=original)
        if_experts: dict[str, Any] = {'visible': self.net.num_experts > 1}
        kind: dict[str, Any] = {
            'type': 'filepath',
            'image_mode': None,
            'sources': ['upload', 'clipboard'],
            'buttons': [],
        }
        with gr.Blocks(title='MoEISR', analytics_enabled=False) as blocks:
            blocks.queue(max_size=8)
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = gr.Image(first[0], label='Your picture', height=220, elem_id='picture', **kind)
                    factor = gr.Slider(1, MAX_FACTOR, FIRST_FACTOR, step=0.1, label='Factor', elem_id='factor')
                    label = 'Save computation'
                    cost = gr.Slider(0, 4, 0, step=0.1, label=label, info=ABOUT_COST, elem_id='cost', **if_experts)
                    with gr.Accordion('How close is it to the original?', open=False):
                        gr.Markdown(ABOUT_TRUTH)
                        truth = gr.Image(first[1], label='Original', height=160, **kind)
                        button = gr.Button('Shrink the original by the factor', size='sm')
                with gr.Column(scale=5, min_width=300):
                    shown: dict[str, Any] = {'interactive': False, 'buttons': ['fullscreen']}
                    label = f'Left: bicubic. Right: {name}'
                    comparison = gr.ImageSlider(label=label, elem_id='comparison', **shown)
                    numbers = gr.HTML(elem_id='numbers')
                    download = gr.DownloadButton('Download the enlarged picture (PNG)', size='sm', elem_id='download')
                    label = 'Which expert made which pixel'
                    experts = gr.Image(label=label, height=400, elem_id='experts', **shown, **if_experts)
                    key = gr.HTML(**if_experts)
            inputs, alone = [picture, factor, cost, truth], {'concurrency_id': 'network', 'concurrency_limit': 1}
            gr.on(
                [blocks.load, *(part.change for part in inputs)],
                told(self.show),
                inputs,
                [comparison, numbers, experts, key, download],
                trigger_mode='always_last',
                show_progress='minimal',  # the pictures stay until the new ones are there
                **alone,
            )
            picture.input(lambda: None, None, truth)  # the original of another picture
            truth.input(told(fitting_factor), [picture, truth, factor], factor)
            button.click(told(self.shrink), [picture, factor, truth], [picture, truth], **alone)
        return blocks


def fitting_factor(picture: str | None, truth: str | None, factor: float) -> float:
    """The factor from a picture to its original, both files; the one at hand where that is no factor of the page."""
    if picture is None or truth is None:
        return factor
    found = read_header(truth, Path(truth).name).height / read_header(picture, Path(picture).name).height
    return round(found, 1) if 1 <= found <= MAX_FACTOR else factor


def serve(net: MoEISR, name: str, host: str, port: int, precision: str) -> None:
    """Serve the page until Ctrl-C; then all its pictures are deleted.

    Raises:
        UserError: The address is in use, or not of this machine.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f'--host {host} --port {port} cannot be used: {error}') from error
    with listening, tempfile.TemporaryDirectory(prefix='basicsr_demo_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder  # read when gradio is imported
        import fastapi
        import gradio as gr
        import uvicorn

        # Not `launch`, which gives up where its own request to the page takes seconds, as on a busy machine.
        app = gr.mount_gradio_app(
            fastapi.FastAPI(),
            Page(net, Path(folder), precision).layout(name),
            path='/',
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),  # no web fonts
            css=CSS,
            footer_links=[],
            max_file_size='64mb',
            ssr_mode=False,
        )
        print(f'The page is at http://{host}:{listening.getsockname()[1]} until Ctrl-C.', flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=1))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
