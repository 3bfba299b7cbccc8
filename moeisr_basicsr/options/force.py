"""`--force_yml`: one key for one run. Nothing in an entry is evaluated."""

import re
from typing import Any

import yaml

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.safe_reading import PlainLoader

from .keys import options_model
from .reader import join_keys, read_text
from .registered import locate
from .values import names_in, schemas

YAML = re.compile(r"""\[|\{|!!float|".*"$|'.*'$""", re.DOTALL)
TEMPLATE = re.compile(r'\{\w*\}.+')  # of file names, such as {}x4


def force(data: dict[str, Any], entry: str) -> tuple[str, ...]:
    """Do what one entry says to `data`: `key:key=value` sets a key, `key:key=~` removes it. Returns its keys.

    Raises:
        UserError: The entry is malformed, or names a key that no options file has.
    """
    keys, text = split(entry)
    section = data
    for depth, name in enumerate(keys):
        _, model, _ = locate(options_model(data.get('model_type')), data, keys[: depth + 1])
        known = {} if model is None else schemas(model)
        if name not in section and name not in known and model is not None and model.model_config['extra'] == 'forbid':
            where = f"'{join_keys(keys[:depth])}' has no key" if depth else 'there is no key'
            raise UserError(f"--force_yml {entry}: {where} '{name}'.{did_you_mean(name, [*section, *known])}")
        if text == '~' and section.get(name) is None:
            section.pop(name, None)
            return keys
        if depth < len(keys) - 1:
            section[name] = {} if section.get(name) is None else section[name]
            section = section[name]
            if not isinstance(section, dict):
                raise UserError(f"--force_yml {entry}: '{join_keys(keys[: depth + 1])}' is a value, not a section.")
    if text == '~':
        del section[keys[-1]]
        return keys
    schema = known.get(keys[-1], {})
    is_name = 'none' in names_in(schema) or (schema.get('type') == 'string' and schema.get('default') is not None)
    section[keys[-1]] = text if text == 'none' and is_name else parse_value(text, f'--force_yml {entry}')
    return keys


def split(entry: str) -> tuple[tuple[str, ...], str]:
    """The keys and the text of the value of one entry.

    Raises:
        UserError: There is no '=', or an empty key.
    """
    keys, sign, value = entry.partition('=')
    path = tuple(key.strip() for key in keys.split(':'))
    if not sign or not all(path):
        raise UserError(f'--force_yml {entry}: write it as key:key=value, for example train:ema_decay=0.999.')
    return path, value.strip()


def parse_value(text: str, source: str = '--force_yml') -> Any:
    """The value of an entry: a list, mapping or quoted text as YAML, else one word; `none` or `None` is nothing.

    One word, not a document: a path may hold what YAML reads as an alias, a comment or a mapping.

    Raises:
        UserError: It is no plain YAML; `source` is named.
    """
    if text.strip().lower() == 'none':
        return None
    if YAML.match(text) and not TEMPLATE.fullmatch(text):
        return read_text(text, source)[0]
    loader = PlainLoader(text)
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    except ValueError as error:
        raise UserError(f'{source:.80}: {text[:40]!r} is no number of 64 bits.') from error
