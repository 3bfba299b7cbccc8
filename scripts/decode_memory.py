"""Peak memory of decoding one large image, alone in its process; a part of `benchmark_decode.py`.

Prints one JSON object: `mib`, the peak beyond input, features and output (null where the system cannot say), `code`
('torch' or 'fused'), and `loads`, the experts' shares of the pixels.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch

from moeisr_basicsr.analysis.measure import PeakMeter
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import output_size
from moeisr_basicsr.core.control import Budget
from moeisr_basicsr.core.render import TORCH, FeatureWindow, Renderer
from moeisr_basicsr.inference import evaluation
from moeisr_basicsr.kernels import fused_backend


def main() -> None:
    """Decode with the mapper's own routing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--precision', default='fp32')
    parser.add_argument('--lq-size', type=int, default=512)
    parser.add_argument('--scale', type=float, default=8)
    parser.add_argument('--threads', type=int)
    parser.add_argument('--budget', type=float, help='route by a budget; by default as trained')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = MoEISR({'type': 'EDSREncoder', 'num_block': 1}).eval()
    with torch.no_grad():
        net.decoder.mapper.query_out.weight.mul_(100)  # random weights would send nearly all pixels to one expert
    lq_size = (args.lq_size, args.lq_size)
    size = output_size(lq_size, args.scale)
    backend = fused_backend(net.decoder, torch.device('cpu'), args.precision)
    lq, feat = torch.rand(1, 3, *lq_size), torch.randn(1, 64, *lq_size)
    output = torch.zeros(3, *size).add_(1)  # written to, so that its pages are there
    window = FeatureWindow(feat, 0, 0, lq_size)
    with evaluation(net, 'cpu', args.precision):
        for rows in ((0, min(size[0], 64)), (0, size[0])):  # a first strip loads the libraries
            loads = torch.zeros(net.num_experts)
            meter = PeakMeter(torch.device('cpu'))
            control = None if args.budget is None else Budget(args.budget, net.expert_costs)
            renderer = Renderer(net.decoder, size, lq_size, control=control, backend=backend or TORCH)
            if control is not None:
                renderer.observe(window, rows, (0, size[1]))
            for top, bottom, strip in renderer.render(window, rows, (0, size[1])):
                output[:, top:bottom] = strip.output[0]
                loads += torch.bincount(strip.expert_map.flatten(), minlength=net.num_experts) / (size[0] * size[1])
    print(
        json.dumps(
            {
                'mib': meter.read() if meter.works else None,
                'code': 'torch' if backend is None else 'fused',
                'loads': loads.tolist(),
                'checksum': float(output.sum() + lq.sum()),
            }
        )
    )


if __name__ == '__main__':
    main()
