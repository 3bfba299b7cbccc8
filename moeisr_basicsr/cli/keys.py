"""`basicsr train --keys`: the tables of the options, for people."""

from moeisr_basicsr.options import schema
from moeisr_basicsr.options.schema import UNSET, Section, Table

SECTIONS = (
    ('', schema.TOP),
    ('datasets: NAME', schema.DATASET),
    ('datasets: train', schema.DATASET_TRAIN),
    ('path', schema.PATH),
    ('train', {**schema.TRAIN, **schema.TRAIN_OURS, **schema.TRAIN_MOEISR}),
    ('val', {**schema.VAL, **schema.VAL_OURS}),
    ('logger', schema.LOGGER),
)


def rows(title: str, table: Table) -> list[tuple[str, str, str, str]]:
    """(key, value, default, meaning) of one section and of those within it."""
    result = []
    for name, key in table.items():
        full = f'{title}: {name}' if title else name
        default = 'required' if key.required else '' if key.default in (UNSET, None) else str(key.default)
        result.append((full, key.kind.words(), default, key.about))
        if isinstance(key.kind, Section):
            result += rows(full, key.kind.table)
    return result


def print_keys(is_train: bool) -> None:
    """Print the tables."""
    tables = [(title, table) for title, table in SECTIONS if is_train or title not in ('train', 'datasets: train')]
    tables += [(f'datasets: NAME ({dataset})', table) for dataset, table in schema.DATASET_OURS.items()]
    for title, table in tables:
        for key, value, default, about in rows(title, table):
            print(f'{key}\n    {about}. {value[0].upper()}{value[1:]}{f"; {default}" if default else ""}.')
    print('\nSections with a `type` take the arguments of the class that it names.')
