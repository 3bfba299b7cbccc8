"""The page: one HTML file that needs no other."""

import jinja2

from moeisr_basicsr.errors import UserError, did_you_mean

from . import charts, crops, experts, quality
from .runs import BICUBIC, Report, with_decoder


def render(report: Report, baseline: str | None = None, max_images: int = 6) -> str:
    """The page as text; the same report gives the same text.

    Args:
        report: What to show.
        baseline: Label of the row that differences refer to; the first row by default.
        max_images: Images to show crops of.

    Raises:
        UserError: No row has the baseline's name.
    """
    known = [*report.labels.values(), BICUBIC]
    baseline = known[0] if baseline is None else baseline
    if baseline not in known:
        hint = did_you_mean(baseline, known)
        raise UserError(f"--baseline: no row has the name '{baseline}'; there are {'; '.join(known)}.{hint}")
    notes = list(report.notes)
    pictures = crops.comparisons(report, max_images, notes)
    series = charts.series_of(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {'number': number, 'expert_shapes': experts.expert_shapes, 'with_decoder': with_decoder}
    return environment.get_template('page.html.j2').render(
        report=report,
        baseline=baseline,
        notes=list(dict.fromkeys(notes)),
        environments={source.environment: source.results['environment'] for source in report.sources},
        quality=quality.quality_tables(report, baseline),
        trade_offs=charts.trade_offs(report, series),
        series=dict.fromkeys(series.values()),
        share_charts=experts.share_charts(report),
        crop_rule=crops.RULE,
        pictures=pictures,
    )


def number(value: float | None, decimals: int = 1, factor: float = 1.0) -> str:
    """Fixed decimals, thousands apart; a dash where there is nothing."""
    return quality.MISSING if value is None else f'{value * factor:,.{decimals}f}'
