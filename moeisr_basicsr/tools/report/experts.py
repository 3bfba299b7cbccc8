"""The experts: their sizes, their colours in the expert maps, their shares of the output pixels."""

import json
from typing import Any, NamedTuple

from moeisr_basicsr.analysis.pictures import expert_colours

from .runs import Measured, Report, group_by


class Share(NamedTuple):
    """One expert's part of a bar."""

    name: str
    share: float
    colour: str
    ink: str  # of the text on it


class Bar(NamedTuple):
    """The routing of one entry in one column."""

    label: str
    shares: list[Share]  # of the output pixels
    texture: float | None  # correlation of the experts' depth with it


def share_charts(report: Report) -> list[tuple[str, str, list[Bar]]]:
    """(dataset, network, a bar per scale and control) of each network that routes."""
    charts = []
    for dataset, columns in report.datasets().items():
        routed = [one for entries in columns.values() for one in entries if len(one.shares) > 1]
        for (name, _), chosen in group_by(routed, lambda one: (one.entry.name, one.entry.network)).items():
            labels = [f'{one.column.label} {report.labels[one.entry]}' for one in chosen]
            bars = [Bar(label, shares(one), one.mean('correlation')) for label, one in zip(labels, chosen)]
            charts.append((dataset, name, bars))
    return charts


def shares(measured: Measured) -> list[Share]:
    """Each expert's share, in the network's order."""
    found = measured.shares
    network = json.loads(measured.entry.network) or {}
    hidden = expert_shapes(network) if network.get('experts') else []
    macs = measured.runs[0].expert_macs
    names = [f'expert {j + 1}' + (f': {hidden[j]}' if j < len(hidden) else '') for j in range(len(found))]
    colours = expert_colours(len(found), macs if macs and len(macs) == len(found) else None)
    colours = colours[:, ::-1].tolist()  # (J, 3) RGB
    return [
        Share(
            name,
            share,
            f'rgb({red} {green} {blue})',
            '#000' if 0.299 * red + 0.587 * green + 0.114 * blue > 115 else '#fff',
        )
        for name, share, (red, green, blue) in zip(names, found, colours)
    ]


def expert_shapes(network: dict[str, Any]) -> list[str]:
    """The hidden layers of each expert, as the options say them, which in results that people edit may be anything."""
    experts = network.get('experts') or [network.get('hidden_list')]
    return [shape(one) for one in experts] if isinstance(experts, list) else [json.dumps(experts)]


def shape(widths: Any) -> str:
    """'4 x 256', or the widths where they differ; of lm those of the latent MLP, and the depth."""
    if widths is None:
        return 'default'
    if isinstance(widths, dict) and isinstance(widths.get('latent'), list):
        return f'{" ".join(map(str, widths["latent"]))} + {widths.get("depth")}'.strip()
    if widths == []:
        return 'none'
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        return json.dumps(widths)
    return f'{len(widths)} x {widths[0]}' if len(set(widths)) == 1 else ' '.join(map(str, widths))
