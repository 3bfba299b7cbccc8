"""Where a super-resolution network's features end and its upsampler begins, found by tracing one forward pass.

Shapes: B images, C_in channels, (H, W) LR size, C channels of the features, s the network's own factor.
"""

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeisr_basicsr.errors import UserError, did_you_mean

SIZE = (64, 128)  # of the traced image: whole windows of every network that is known
STEPS = (1, 2, 4, 8, 16, 32)  # of sizes


class Cut(NamedTuple):
    """A place in a forward pass: what goes into or comes out of a module, or into `F.interpolate`."""

    module: str  # its name; empty for F.interpolate
    is_input: bool
    call: int  # which of its calls in the pass, from 0


class Traced(NamedTuple):
    """What a network consists of."""

    cut: Cut
    num_feat: int  # C
    scale: int  # s
    multiple: int  # H and W must be multiples of it
    minimum: int  # and at least so large
    tail: list[str]  # modules that run only after the cut


class Record(NamedTuple):
    """A tensor of LR size where the cut could be."""

    cut: Cut
    time: int
    tensor: Callable[[], Tensor | None]  # a weak reference
    version: int  # changes with every operation in place
    channels: int
    depth: int  # of nested calls


class Reached(Exception):
    """Ends a forward pass at the cut."""


class Watch(TorchFunctionMode):
    """Tells of the borders of modules and of the inputs of `F.interpolate` in one forward pass."""

    def __init__(self, tell: Callable[[Cut, Any], None]):
        super().__init__()
        self.tell = tell
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.interpolate:
            self.tell(Cut('', True, self.calls['']), args or kwargs)
            self.calls[''] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watch(self, network: nn.Module, modules: list[str]) -> Iterator[None]:
        """Within, forward passes of `network` are told of: of the calls of `modules`, of F.interpolate for ''."""

        def entered(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                self.tell(Cut(name, True, self.calls[name]), (*args, *kwargs.values()))
                self.calls[name] += 1

            return hook

        def left(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                self.tell(Cut(name, False, self.calls[name] - 1), output)

            return hook

        with ExitStack() as stack:
            for name in filter(None, modules):
                module = network.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(entered(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(left(name)).remove)
            if '' in modules:
                stack.enter_context(self)
            yield


class Tracer(Watch):
    """Records the tensors of LR size up to the first upsampled one, and when which module ran."""

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__(self.note)
        self.channels, self.size = channels, size
        self.records: list[Record] = []
        self.order: list[tuple[int, str]] = []  # time and name of every call
        self.time = self.depth = 0
        self.has_grown = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in (torch.pixel_shuffle, F.pixel_shuffle):  # that are the pixels of an image already, no features
            while self.records and self.records[-1].tensor() is args[0]:
                self.records.pop()
        if isinstance(result, Tensor):
            self.look_at(result)
        return result

    def look_at(self, tensor: Tensor) -> None:
        # The image itself may be upsampled first, to be added in the end: no growth of features.
        if tensor.dim() == 4 and tensor.shape[0] == 1 and tensor.shape[1] > self.channels:
            factor = tensor.shape[-2] // self.size[0]
            self.has_grown |= factor > 1 and tuple(tensor.shape[-2:]) == tuple(factor * side for side in self.size)

    def note(self, cut: Cut, value: Any) -> None:
        self.time += 1
        if cut.module and cut.is_input:
            self.order.append((self.time, cut.module))
            self.depth += 1
        tensor = first_tensor(value)
        if tensor is not None:
            self.look_at(tensor)
        if tensor is not None and not self.has_grown and (tensor.shape[0], *tensor.shape[2:]) == (1, *self.size):
            last = self.records[-1] if self.records else None
            same = last is not None and last.tensor() is tensor and last.version == tensor._version
            if not (same and last is not None and last.cut.is_input and cut.is_input):  # the outermost module's
                depth = self.depth + (not cut.module)
                self.records.append(
                    Record(cut, self.time, weakref.ref(tensor), tensor._version, tensor.shape[1], depth)
                )
        self.depth -= bool(cut.module and not cut.is_input)

    def last_of_trunk(self) -> Record | None:
        """The last record of the trunk's width: of the most frequent one among the outermost calls that repeat one."""
        wide = [record for record in self.records if record.channels > self.channels]
        for depth in sorted({record.depth for record in wide}):
            widths = Counter(record.channels for record in wide if record.depth == depth)
            width, count = widths.most_common(1)[0]
            if count > 1:
                return next(record for record in reversed(wide) if record.channels == width)
        return None

    def only_after(self, time: int) -> list[str]:
        """Modules that are called after `time` and not before, without those inside of others of them."""
        before = {name for called, name in self.order if called < time}
        after = {name for called, name in self.order if called >= time} - before
        return sorted(name for name in after if not any(name.startswith(f'{other}.') for other in after))


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor with four dimensions among arguments or results."""
    if isinstance(value, Tensor):
        return value if value.dim() == 4 else None
    if isinstance(value, (tuple, list)):
        return next((found for found in map(first_tensor, value) if found is not None), None)
    if isinstance(value, dict):
        return first_tensor(list(value.values()))
    return None


def features_and_image(network: nn.Module, x: Tensor, cut: Cut, tail: bool) -> tuple[Tensor, Tensor | None]:
    """Features at the cut, (B, C, >= H, >= W), and with `tail` the image; without it the pass ends at the cut."""
    taken: list[Tensor] = []

    def take(place: Cut, value: Any) -> None:
        if place == cut:
            tensor = first_tensor(value)
            assert tensor is not None
            # a copy, where the tail could change it in place
            taken.append(tensor.clone() if tail else tensor)
            if not tail:
                raise Reached

    image = None
    with Watch(take).watch(network, [cut.module]), suppress(Reached):
        image = first_tensor(network(x))
    return taken[0], image


def trace(network: nn.Module, channels: int, name: str, features: str | None = None) -> Traced:
    """Find the cut.

    Args:
        network: From (B, C_in, H, W) in [0, 1] to an image; all of it, in any mode, which it keeps.
        channels: C_in.
        name: What the network is called, for messages.
        features: The module whose input are the features, in place of the search.

    Raises:
        UserError: There is no such place, or no image comes out.
    """
    shadow = copy.deepcopy(network).eval()
    modules = [module for module, _ in shadow.named_modules() if module]
    if features is not None and features not in modules:
        raise UserError(f'{name} has no module {features!r} for `features`.{did_you_mean(features, modules)}')
    try:  # without data: no time, no memory
        return _trace(shadow.to('meta'), channels, name, features, modules)
    except UserError:
        raise
    except Exception:  # not every network's code runs without data
        if any(parameter.is_meta for parameter in network.parameters()):
            raise
    try:
        return _trace(copy.deepcopy(network).eval(), channels, name, features, modules)
    except UserError:
        raise
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'{name} does not run on an image of {channels} channels: {type(error).__name__}: {reason}.'
        ) from error


def _trace(network: nn.Module, channels: int, name: str, features: str | None, modules: list[str]) -> Traced:
    first = next(network.parameters())
    image = torch.zeros(1, channels, *SIZE, device=first.device, dtype=first.dtype)
    tracer = Tracer(channels, SIZE)
    with tracer.watch(network, ['', *modules]), torch.no_grad():
        output = first_tensor(network(image))
    if output is None or output.shape[1] != channels:
        raise UserError(f'{name} gives no image of {channels} channels for one of {channels} channels.')
    scale = output.shape[-2] // SIZE[0]
    if tuple(output.shape[-2:]) != (scale * SIZE[0], scale * SIZE[1]) or scale < 2:
        raise UserError(
            f'{name} makes {output.shape[-2]} x {output.shape[-1]} of an image of {SIZE[0]} x {SIZE[1]}: it is '
            'no super-resolution network with a whole factor of at least 2.'
        )
    if features is None:
        record = tracer.last_of_trunk()
    else:
        record = next((one for one in tracer.records if one.cut == Cut(features, True, 0)), None)
    if record is None:
        raise UserError(
            f"{name} has no features of the input's size before it upsamples; `features: MODULE` can name the "
            'module that they go into.'
            if features is None
            else f'what goes into {features} of {name} are no features of the size of the input.'
        )
    fits = functools.partial(_fits, network, record, channels, scale)
    multiple = next((step for step in STEPS if fits((SIZE[0] + step, SIZE[0] + 3 * step))), SIZE[0])
    minimum = next((step for step in STEPS if step >= multiple and fits((step, step))), SIZE[0])
    return Traced(record.cut, record.channels, scale, multiple, minimum, tracer.only_after(record.time))


@torch.no_grad()
def _fits(network: nn.Module, record: Record, channels: int, scale: int, size: tuple[int, int]) -> bool:
    """Whether an image of this size passes, with features and image of the sizes they should have, or larger."""
    first = next(network.parameters())
    x = torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype)
    try:
        feat, image = features_and_image(network, x, record.cut, tail=True)
    except Exception:  # whatever a network has against a size
        return False
    assert image is not None
    is_feat = feat.shape[1] == record.channels and all(have >= need for have, need in zip(feat.shape[-2:], size))
    return is_feat and all(have >= scale * need for have, need in zip(image.shape[-2:], size))
