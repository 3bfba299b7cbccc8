"""Reading an options file: values as YAML means them, broken and hostile files, and that nothing in them runs."""

import pytest
from options_cases import write

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import read_yaml

pytestmark = pytest.mark.usefixtures('images_here')


def test_values():
    document = read_yaml(
        write(
            'a: 1e-4\nb: !!float 1\nc: 1.5e+3\nd: [1, 2.0, x]\ne: ~\nf: none\ng: 2024-01-02\n'
            'h: 0x10\ni: {k: yes}\nz: -3\n'
        )
    )
    expected = {
        'a': 1e-4,
        'b': 1.0,
        'c': 1500.0,
        'd': [1, 2.0, 'x'],
        'e': None,
        'f': 'none',
        'g': '2024-01-02',
        'h': 16,
        'i': {'k': True},
        'z': -3,
    }
    assert document.data == expected
    assert list(document.data) == list(expected)
    assert all(type(document.data[key]) is type(value) for key, value in expected.items())
    assert document.where(('i', 'k')) == 'run.yml:9'
    assert document.where(('i', 'not there')) == 'run.yml:9'


def test_merge_keys_give_way_to_own_keys():
    data = read_yaml(write('base: &base {a: 1, b: 2}\nown:\n  b: 3\n  <<: *base\n')).data
    assert data['own'] == {'a': 1, 'b': 3}


@pytest.mark.parametrize(
    ('text', 'line', 'words'),
    [
        ('a: 1\nb: [1,\n', 3, 'broken YAML'),
        ('a: 1\na: 2\n', 2, 'the key a stands twice; it is already in line 1'),
        ('s:\n  a: 1\n  a: 2\n', 3, 'the key s.a stands twice'),
        ('a:\n\t- b\n', 2, 'broken YAML'),
        ('a: b: c\n', 1, 'broken YAML'),
        ('a: *nothing\n', 1, 'undefined alias'),
        ('- 1\n', 1, 'must consist of `key: value` lines'),
        ('', 1, 'must consist of `key: value` lines'),
        ('a: !!float abc\n', 1, "'abc' is no float"),
        ('a: 1\n? [x, y]\n: 2\n', 2, 'a key must be plain text'),
        (
            'a: !!python/object/apply:os.system ["touch ran"]\n',
            1,
            'the tag !!python/object/apply:os.system is not allowed',
        ),
        ('a: !!python/name:os.system\n', 1, 'not allowed'),
        ('x: 1\na: !!python/object/new:subprocess.Popen [["touch", "ran"]]\n', 2, 'not allowed'),
        ('!!python/object/apply:os.system ["touch ran"]: 1\n', 1, 'a key must be plain text'),
        ('a: !custom 1\n', 1, 'the tag !custom is not allowed'),
        ('a: !!binary aGk=\n', 1, 'not allowed'),
        ('a: &a [*a]\n', 1, 'too large or refers to itself'),
        ('a: 1\n---\nb: 2\n', 2, 'broken YAML'),
        (f'a: 1\nb: {"1" * 400}\n', 2, 'is no int of 64 bits'),
        (f'a: 1\nb: {"1" * 5000}\n', 2, 'is no int of 64 bits'),
        ('a: 1\nb: {<<: {? [x] : 1}}\n', 2, 'a key must be plain text'),
        ('a: 1\nb: {<<: 3}\n', 2, 'expected a mapping'),
    ],
)
def test_broken_and_hostile_yaml(images_here, text, line, words):
    with pytest.raises(UserError) as caught:
        read_yaml(write(text))
    message = str(caught.value)
    assert message.startswith(f'run.yml:{line}: ') and words in message and '\n' not in message
    assert not (images_here / 'ran').exists()


def test_aliases_of_aliases_do_not_fill_the_memory():
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12)]
    with pytest.raises(UserError, match='too large'):
        read_yaml(write('\n'.join(lines)))
    for depth in (60, 900, 3000):
        with pytest.raises(UserError, match='nested too deeply|too large'):
            read_yaml(write('a: ' + '[' * depth + ']' * depth))
    with pytest.raises(UserError, match='nested too deeply'):
        read_yaml(write('a: &a {<<: *a}'))


def test_unreadable_files(images_here):
    with pytest.raises(UserError, match='nothere.yml: cannot read this options file: No such file'):
        read_yaml('nothere.yml')
    with pytest.raises(UserError, match='cannot read'):
        read_yaml(str(images_here))
    (images_here / 'image.yml').write_bytes(b'\x89PNG\xff\xfe')
    with pytest.raises(UserError, match='not UTF-8'):
        read_yaml('image.yml')
