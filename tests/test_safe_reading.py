"""Safe reading: values as the file means them; what is broken, hostile or no plain data is rejected, nothing runs."""

import os
import pickle
from collections import Counter, OrderedDict

import pytest
import torch
import yaml

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.force import parse_value
from moeisr_basicsr.safe_reading import PlainLoader, load_torch_file


def load_yaml(text):
    return yaml.load(text, Loader=PlainLoader)


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e-4', 1e-4),
        ('1E5', 1e5),
        ('-2.5e+3', -2500.0),
        ('.5e-1', 0.05),
        ('!!float 1e-4', 1e-4),
        ('1.5', 1.5),
        ('-.5', -0.5),
        ('3.', 3.0),
        ('3', 3),
        ('-3', -3),
        ('1e', '1e'),
        ('e5', 'e5'),
        ('1e-4x', '1e-4x'),
        ('x2', 'x2'),
        ('~', None),
        ('true', True),
        ("'1e-4'", '1e-4'),
        ('09', '09'),
        ('2024-01-02', '2024-01-02'),
    ],
)
def test_yaml_scalars(text, value):
    loaded = load_yaml(f'key: {text}')['key']
    assert loaded == value and type(loaded) is type(value)


def test_yaml_keeps_order_and_merges():
    loaded = load_yaml('z: &base {b: 1, a: 2}\ny: {<<: *base, a: 3}\nx: [1, {k: v}]')
    assert list(loaded) == ['z', 'y', 'x'] and list(loaded['z']) == ['b', 'a'] and loaded['y'] == {'b': 1, 'a': 3}


def test_merges_of_merges_do_not_fill_the_memory():
    """400 bytes that would be 100,000 entries."""
    lines = ['a0: &a0 {' + ', '.join(f'k{i}: 1' for i in range(10)) + '}']
    lines += [f'a{i}: &a{i} {{<<: [' + ', '.join([f'*a{i - 1}'] * 10) + ']}' for i in range(1, 5)]
    with pytest.raises(yaml.YAMLError, match='too large'):
        load_yaml('\n'.join(lines))
    loaded = load_yaml('\n'.join(lines[:3]))
    assert loaded['a2'] == loaded['a0'] == {f'k{i}': 1 for i in range(10)}


def test_merges_keep_their_order():
    loaded = load_yaml('a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2, z: 2}\nc: {z: 3, <<: [{x: 4}, *b]}')
    assert loaded['c'] == {'x': 4, 'y': 2, 'z': 3}


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1', 1),
        ('-7', -7),
        ('0.5', 0.5),
        ('1e-4', 1e-4),
        ('True', True),
        ('none', None),
        ('~', None),
        ('abc', 'abc'),
        ('a b', 'a b'),
        ("[1, 'x', ~]", [1, 'x', None]),
        ('[1, x, 1e-3]', [1, 'x', 1e-3]),
        ('{a: 1}', {'a': 1}),
        ('1.2.3', '1.2.3'),
        ('!!float 3', 3.0),
        ('nan', 'nan'),
        ('[]', []),
        ('*.png', '*.png'),  # an alias in YAML
        ('~/a: #1', '~/a: #1'),
        ('', None),
        ('!!python/name:os.system', '!!python/name:os.system'),
    ],
)
def test_override_values(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    'text',
    [
        '1' * 400,
        '-' + '9' * 5000,
        '0x_',
        '9223372036854775808',
        '[' * 100_000,
        '[1,',
        '{a',
        '!!float x',
        '[!!python/name:os.system 1]',
        '[1] 2',
    ],
)
def test_override_that_is_not_well_formed(text):
    with pytest.raises(UserError, match='--force_yml'):
        parse_value(text)


class Hostile:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_weights_are_rejected(tmp_path, monkeypatch, legacy):
    target, path = tmp_path / 'hacked', tmp_path / 'net.pth'
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save({'params': Hostile(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match='net.pth is no checkpoint .* Nothing in it was run.$'):
        load_torch_file(path)
    assert not target.exists()


def test_plain_containers_are_read(tmp_path):
    content = {'weight': torch.rand(2, 3), 'steps': Counter([2, 2, 9]), 'names': OrderedDict(a=[1, (2.5, None)])}
    torch.save(content, tmp_path / 'state')
    loaded = load_torch_file(tmp_path / 'state')
    assert torch.equal(loaded.pop('weight'), content.pop('weight')) and loaded == content


def test_damaged_and_missing_weights(tmp_path):
    path = tmp_path / 'net.pth'
    for content in (b'', b'junk', b'\xff\xd8\xff\xe0\0\x10JFIF', pickle.dumps([1])[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='net.pth is no checkpoint that can be read: it is damaged') as caught:
            load_torch_file(path)
        assert 'weights_only' not in str(caught.value)  # torch's advice is the unsafe way
    with pytest.raises(FileNotFoundError):
        load_torch_file(tmp_path / 'missing.pth')
