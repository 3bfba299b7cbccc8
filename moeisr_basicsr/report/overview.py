"""What was compared: files, where they were measured, networks."""

from .collect import Report
from .markup import Markup, head_row, number, row, table, text, words

ENVIRONMENT = {
    'device_name': 'device',
    'threads': 'threads',
    'kernel': 'kernel',
    'cpu': 'processor',
    'torch': 'torch',
    'python': 'python',
    'moeisr_basicsr': 'moeisr_basicsr',
    'platform': 'platform',
}


def environments(report: Report) -> list[dict]:
    """The environments, each once, in order of appearance."""
    found: list[dict] = []
    for source in report.sources:
        if source.results['environment'] not in found:
            found.append(source.results['environment'])
    return found


def letter(place: int) -> str:
    """A, B, ... for environments."""
    return chr(ord('A') + place) if place < 26 else f'A{place}'


def environment_of(report: Report, source: int) -> str:
    """The letter of a source's environment."""
    return letter(environments(report).index(report.sources[source].results['environment']))


def sources_table(report: Report) -> Markup:
    """Which file holds what; tables name files by these numbers."""
    rows = []
    for place, source in enumerate(report.sources):
        model = source.results.get('model')
        rows.append(
            row(
                f'[{place + 1}]',
                text(source.path),
                text(f'basicsr {source.results["command"]}'),
                text(model and model['name']),
                text(model and (model.get('file') or 'random')),
                text(environment_of(report, place)),
            )
        )
    return table('Files', [head_row(*words('', 'file', 'written by', 'model', 'weights', 'environment'))], rows)


def environment_table(report: Report) -> Markup:
    """Where the figures were measured."""
    rows = []
    for place, where in enumerate(environments(report)):
        variables = ', '.join(f'{name}={value}' for name, value in (where.get('variables') or {}).items())
        rows.append(row(letter(place), *(text(where.get(key)) for key in ENVIRONMENT), text(variables or None)))
    return table('Environments', [head_row(*words('', *ENVIRONMENT.values(), 'variables'))], rows)


def models_table(report: Report) -> Markup:
    """Networks with their parameters; seeds and controls of one network share a row."""
    rows = {}
    held = [(run.source, run.entry) for run in report.runs] + [(place, entry) for place, entry, _ in report.profiles]
    for place, entry in held:
        model = report.sources[place].results.get('model')
        if model is None or (entry.name, entry.network) in rows:
            continue
        options, count = model.get('network_g') or {}, model['parameters']
        hidden = options.get('experts') or [options.get('hidden_list')]
        parts = [count.get(part) for part in ('encoder', 'mapper', 'shared')]
        parts += [sum(count['experts']) if count.get('experts') else None, count['total']]
        rows[entry.name, entry.network] = row(
            entry.name,
            text(options.get('type')),
            text((options.get('encoder') or {}).get('type')),
            text('; '.join(map(shape, hidden))),
            *(number(part, 1, 1e-3) for part in parts),
        )
    head = head_row(
        *words('model', 'type', 'encoder', 'hidden layers of each expert'),
        'encoder',
        'mapper',
        'shared',
        'experts',
        'all',
    )
    return table('Models; parameters in thousands', [head], list(rows.values()))


def shape(widths: list[int] | None) -> str:
    """'4 x 256', or the widths where they differ."""
    if widths is None:
        return 'default'
    if not widths:
        return 'none'
    return f'{len(widths)} x {widths[0]}' if len(set(widths)) == 1 else ' '.join(map(str, widths))
