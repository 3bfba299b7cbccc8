"""An ONNX file of a network: made, compared with the network itself, and only then written.

Shapes: (H, W) LR size, (R, S) output size.
"""

import io
import json
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from moeisr_basicsr.archs.moeisr_arch import FixedScale, MoEISR
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.checkpoint import FORMAT, Model, load_any, read_checkpoint
from moeisr_basicsr.errors import UserError

from .onnx_graph import example, script

OPSET = 17
TOLERANCE = 1e-4  # of the image, in [0, 1]
TIES = 1e-3  # share of pixels whose two best experts may be equal to rounding
PROBE = (21, 34), (71, 139)  # an image's size and its output's: unequal factors, no sizes that were traced, two tiles
ABOUT = (
    'image: RGB in [0, 1], (1, 3, H, W). size: rows and columns of the output, none smaller than those of the image. '
    'cost_weight: 0 for the trained routing, above 0 cheaper, below 0 more expensive. '
    'upscaled: (1, 3, R, S), not clamped. expert_map: (1, R, S), the expert that made each pixel.'
)


class Difference(NamedTuple):
    """Between the results of a file and of its network."""

    largest: float  # of the image, where both have chosen the same expert
    rerouted: float  # share of the pixels where they have not


def export(path: str | PathLike, out: str | PathLike) -> Difference:
    """Write the ONNX file of a model file or checkpoint, once it has been compared with the network on one image.

    Raises:
        UserError: onnx or onnxruntime is missing; see `load_any`; the network has no such form.
        OSError: The file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            'basicsr export needs the packages onnx and onnxruntime: pip install onnx onnxruntime'
        ) from error
    net = load_any(path).requires_grad_(False)
    try:
        content = to_onnx(net, metadata_of(path, net))
        difference = compare(net, content)
    except Exception as error:  # of code of any encoder, of the exporter or of the runtime
        reason = str(error).strip().partition('\n')[0]
        raise UserError(f'{path}: {type(net.encoder).__name__} has no ONNX form: {reason}') from error
    if not (difference.largest <= TOLERANCE and difference.rerouted <= TIES):
        raise UserError(
            f'{path}: the ONNX form differs from the network by up to {difference.largest:.1e}, and in the expert of '
            f'{difference.rerouted:.1%} of the pixels; {type(net.encoder).__name__} may compute with sizes in Python.'
        )
    write_atomic(out, lambda file: file.write(content))
    return difference


def metadata_of(path: str | PathLike, net: MoEISR) -> dict[str, str]:
    """What a model file says of itself, for the ONNX file: `network_g` makes the network anew."""
    try:
        model = read_checkpoint(path)
    except UserError:  # a network of others, which `load_any` has recognised by its weights
        model = Model({}, {}, {})
    options: Mapping = model.network_opt
    if isinstance(net, FixedScale) and options.get('type') != 'FixedScale':
        options = {'type': 'FixedScale', 'encoder': net.encoder.options}
    return {**model.metadata, 'format': FORMAT, 'network_g': json.dumps(options, sort_keys=True)}


def to_onnx(net: MoEISR, metadata: Mapping[str, str]) -> bytes:
    """The content of an ONNX file; see `ABOUT` for its inputs and outputs."""
    import onnx

    buffer: Any = io.BytesIO()  # this exporter takes it, its stub does not say so
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that this exporter is the older one; only it takes a compiled loop
        torch.onnx.export(
            script(net),
            example(net),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=['image', 'size', 'cost_weight'],
            output_names=['upscaled', 'expert_map'],
            dynamic_axes={'image': {2: 'H', 3: 'W'}, 'upscaled': {2: 'R', 3: 'S'}, 'expert_map': {1: 'R', 2: 'S'}},
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    model.doc_string = ABOUT
    if net.num_experts == 1:  # the exporter leaves out what has no effect; all files are called alike
        model.graph.input.append(onnx.helper.make_tensor_value_info('cost_weight', onnx.TensorProto.FLOAT, []))
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=False)
    return model.SerializeToString()


def compare(net: MoEISR, content: bytes) -> Difference:
    """An ONNX file in onnxruntime against the network in PyTorch, on one image."""
    import onnxruntime

    lq_size, size = PROBE
    image = torch.rand(1, net.in_channels, *lq_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net.decode_image(net.encode(image), size)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only; its optimiser tells what it leaves as it is
    session = onnxruntime.InferenceSession(content, settings, providers=['CPUExecutionProvider'])
    upscaled, experts = session.run(
        None, {'image': image.numpy(), 'size': np.array(size, np.int64), 'cost_weight': np.zeros((), np.float32)}
    )
    same = np.ones_like(experts, bool) if expected.expert_map is None else experts == expected.expert_map.numpy()
    distance = np.abs(upscaled - expected.output.numpy()).max(axis=1)
    return Difference(float(np.where(same, distance, 0).max()), 1 - float(same.mean()))
