"""Classes that `type` names: those of other packages, and a network by itself."""

import copy

import pytest
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from options_cases import BASICSR, problems, swap, write
from torch import nn

from moeisr_basicsr.options import OptionsError, check_network, load_options

pytestmark = pytest.mark.usefixtures('images_here')


@pytest.fixture
def foreign():
    """Register classes as another package does, and take them out again."""
    added = []

    def register(registry, entry):
        entry.__module__ = 'somebody.else'
        registry.register(entry)
        added.append((registry, entry.__name__))

    yield register
    for registry, name in added:
        del registry._obj_map[name]


def test_types_of_other_packages(foreign):
    class TheirNet(nn.Module):
        def __init__(self, width, height=3, *, depth: int = 2):
            super().__init__()

    class TheirOpenNet(nn.Module):
        def __init__(self, width=1, **kwargs):
            super().__init__()

    class TheirDataset:
        pass

    class TheirModel:
        pass

    class TheirEncoder(nn.Module):
        def __init__(self, num_in_ch, channels=4):
            super().__init__()
            self.num_feat = channels

    for registry, entry in (
        (ARCH_REGISTRY, TheirNet),
        (ARCH_REGISTRY, TheirOpenNet),
        (ARCH_REGISTRY, TheirEncoder),
        (DATASET_REGISTRY, TheirDataset),
        (MODEL_REGISTRY, TheirModel),
    ):
        foreign(registry, entry)

    def with_network(lines):
        head, _, rest = BASICSR.partition('network_g:\n')
        return head + 'network_g:\n' + lines + 'path:' + rest.partition('path:')[2]

    load_options(write(with_network('  type: TheirNet\n  width: 3\n')))
    assert "Did you mean 'height'?" in problems(with_network('  type: TheirNet\n  width: 3\n  heigth: 3\n'))[0]
    assert "the key 'width' is missing" in problems(with_network('  type: TheirNet\n'))[0]
    load_options(write(with_network('  type: TheirOpenNet\n  anything: 3\n')))

    text = swap('type: SingleImageDataset\n    dataroot_lq: images', 'type: TheirDataset\n    theirs: 1', BASICSR)
    load_options(write(text))
    text = swap('model_type: SRModel', 'model_type: TheirModel\ntheirs: {a: 1}', BASICSR)
    load_options(write(swap('total_iter', 'their_key: 1\n  total_iter', text)))

    text = swap('type: EDSREncoder\n    num_feat: 8\n    num_block: 1', 'type: TheirEncoder\n    channels: 3')
    load_options(write(text))
    assert "Did you mean 'channels'?" in problems(swap('channels: 3', 'chanels: 3', text))[0]


def test_check_network():
    good = {'type': 'LIIF', 'encoder': {'type': 'RDNEncoder', 'config': 'A'}, 'hidden_list': [8]}
    before = copy.deepcopy(good)
    check_network(good, 'model.safetensors')
    assert good == before
    with pytest.raises(OptionsError) as caught:
        check_network({**good, 'encoder': {'type': 'RDNEncoder', 'config': 'C'}, 'x': 1}, 'model.safetensors')
    assert [problem.partition('.')[0] for problem in caught.value.problems] == ['model', 'model']
    with pytest.raises(OptionsError, match='must be a section'):
        check_network([1], 'model.safetensors')
