"""The page: one HTML file that needs no other."""

import html

from .charts import legend, series_of, share_charts, trade_offs
from .collect import Report
from .costs import correlation_table, cost_tables, profile_table
from .crops import RULE, picture_section
from .markup import Markup, join, tag, void
from .overview import environment_table, environments, models_table, sources_table
from .quality import BICUBIC_LABEL, choose_baseline, quality_tables
from .style import STYLE

# The browser itself enforces that nothing is loaded or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TITLE = 'Super-resolution results'
GENERATOR = void('meta', name='generator', content='moeisr_basicsr report')
HEAD_BYTES = 2048  # hold all before the style


def render(report: Report, baseline: str | None = None, max_images: int = 6) -> str:
    """The page as text; the same report gives the same text.

    Args:
        report: What to show.
        baseline: Label of the row that differences refer to; the first row by default.
        max_images: Images to show crops of.

    Raises:
        UserError: No row has the baseline's name, or a saved picture is damaged.
    """
    base = choose_baseline(report, baseline)
    pictures, picture_notes = picture_section(report, max_images)
    notes = list(dict.fromkeys(report.notes + environment_notes(report) + picture_notes))
    head = [
        void('meta', charset='utf-8'),
        void('meta', http_equiv='Content-Security-Policy', content=POLICY),
        GENERATOR,
        void('meta', name='viewport', content='width=device-width, initial-scale=1'),
        void('meta', name='color-scheme', content='light dark'),
        tag('title', TITLE),
        tag('style', Markup(STYLE)),
    ]
    body = [
        tag('h1', TITLE),
        header(report, notes),
        quality(report, base),
        cost(report, base),
        trade_off(report),
        routing(report),
        section('Pictures', RULE, pictures),
    ]
    return '<!DOCTYPE html>\n' + tag('html', tag('head', head), tag('body', tag('main', body)), lang='en') + '\n'


def is_page(content: bytes) -> bool:
    """Whether a file's content is a page of `render`; the first ones had no generator, but title and policy."""
    head = content[:HEAD_BYTES].decode(errors='replace')
    return head.startswith('<!DOCTYPE html>\n<html') and (
        GENERATOR in head or (tag('title', TITLE) in head and html.escape(POLICY) in head)
    )


def section(title: str, about: str, parts: list[Markup | None]) -> Markup | None:
    """A heading with what belongs to it; None where there is nothing."""
    parts = [part for part in parts if part is not None]
    return tag('section', tag('h2', title), tag('p', about), parts) if parts else None


def header(report: Report, notes: list[str]) -> Markup:
    """What was compared, and what a reader must know first."""
    names = '; '.join(report.labels.values())
    told = tag('div', tag('b', 'Notes'), tag('ul', [tag('li', note) for note in notes]), cls='notes') if notes else None
    return join(
        [
            tag('p', 'Compared: ', names, '.'),
            told,
            sources_table(report),
            environment_table(report),
            models_table(report),
        ]
    )


def environment_notes(report: Report) -> list[str]:
    """Times of different machines or settings say nothing about each other."""
    if len(environments(report)) < 2:
        return []
    return ['The files were measured in different environments: times and memory compare within one environment only.']


def quality(report: Report, baseline: str) -> Markup | None:
    """The tables of metrics."""
    about = (
        f'Means over the images. Differences (diff.) are to {baseline}. Bold: the best model of a column, equal '
        f'figures alike; {BICUBIC_LABEL} does not compete. a ± b (n): mean and half the range over n seeds. s is '
        'the scale, rows before columns where they differ. Numbers in brackets name the files.'
    )
    return section('Quality', about, quality_tables(report, baseline))


def cost(report: Report, baseline: str) -> Markup | None:
    """The tables of multiply-adds, time and memory."""
    about = (
        'Multiply-adds as routed, those of linear layers, convolutions and attention, one per multiply-add. The '
        'decoder is mapper, LR tables and experts (mean of the chosen ones). Dense is the heaviest expert of '
        f'{baseline} on every pixel (of the profiled network itself among the profiles): plain as published (four '
        'passes per pixel), folded by this code.'
    )
    return section('Cost', about, [*cost_tables(report, baseline), profile_table(report)])


def trade_off(report: Report) -> Markup | None:
    """The charts of quality against cost."""
    series = series_of(report)
    charts = trade_offs(report, series)
    if not charts:
        return None
    about = (
        'A mark per model and control, means over the seeds; multiply-adds and time are of encoder and decoder. A '
        'line connects the controls of one model; the number below a mark is its budget or cost weight.'
    )
    return section('Quality against cost', about, [legend(series), tag('div', charts, cls='figures')])


def routing(report: Report) -> Markup | None:
    """Shares of the experts, and whether depth follows texture."""
    about = 'Experts are numbered as in the network; colours go from cheap to dear in yellow, green, blue and red.'
    return section('Routing', about, [*share_charts(report), correlation_table(report)])
