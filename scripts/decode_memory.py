"""Peak memory of decoding one large image, alone in its process; a part of `benchmark_decode.py`.

Prints one JSON object: `mib`, the peak beyond input, features and output (null where the system cannot say), and `code`.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch  # noqa: E402

from moeisr_basicsr.analysis.measure import PeakMeter  # noqa: E402
from moeisr_basicsr.archs.moeisr_arch import MoEISR  # noqa: E402
from moeisr_basicsr.core import output_size  # noqa: E402
from moeisr_basicsr.core.control import Budget  # noqa: E402
from moeisr_basicsr.core.render import TORCH, FeatureWindow, Renderer  # noqa: E402
from moeisr_basicsr.inference import evaluation  # noqa: E402
from moeisr_basicsr.kernels import fused_backend  # noqa: E402

BUDGET = 0.3  # random weights would send every pixel to one or two experts


def main() -> None:
    """Decode with the mapper's own routing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--precision', default='fp32')
    parser.add_argument('--lq-size', type=int, default=512)
    parser.add_argument('--scale', type=float, default=8)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = MoEISR({'type': 'EDSREncoder', 'num_block': 1}).eval()
    lq_size = (args.lq_size, args.lq_size)
    size = output_size(lq_size, args.scale)
    backend = fused_backend(net.decoder, torch.device('cpu'), args.precision)
    lq, feat = torch.rand(1, 3, *lq_size), torch.randn(1, 64, *lq_size)
    output = torch.zeros(3, *size).add_(1)  # written to, so that its pages are there
    window = FeatureWindow(feat, 0, 0, lq_size)
    with evaluation(net, 'cpu', args.precision):
        for rows in ((0, min(size[0], 64)), (0, size[0])):  # a first strip loads the libraries
            meter = PeakMeter(torch.device('cpu'))
            renderer = Renderer(net.decoder, size, lq_size, control=Budget(BUDGET, net.expert_costs),
                                backend=backend or TORCH)
            renderer.observe(window, rows, (0, size[1]))
            for top, bottom, strip in renderer.render(window, rows, (0, size[1])):
                output[:, top:bottom] = strip.output[0]
    print(json.dumps({'mib': meter.read() if meter.works else None, 'code': 'torch' if backend is None else 'fused',
                      'checksum': float(output.sum() + lq.sum())}))


if __name__ == '__main__':
    main()
