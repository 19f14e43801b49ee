"""The ragged classes as HTML for notebooks: one coloured cell per value, so that raggedness is seen.

Every key has one colour (Okabe and Ito's palette, told apart by colour-blind readers too) and one block; every
row of the batch is a line of cells. Long data are cut, and the cut says how much is missing. Fills are translucent and
text takes the page's colour, so light and dark themes both work. Only what is shown is copied from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from recsys_edu.sparse.jagged import JaggedTensor
    from recsys_edu.sparse.keyed import KeyedTensor
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor

MAX_KEYS = 8
MAX_ROWS = 8
MAX_ROWS_OF_MANY_KEYS = 4
MAX_CELLS = 12
MAX_COLUMNS = 6  # of one key of a KeyedTensor

# Okabe & Ito (2008), as red, green, blue; without black, which vanishes on a dark page.
COLOURS = ("230,159,0", "86,180,233", "0,158,115", "204,121,167", "0,114,178", "213,94,0", "240,228,66")

STYLE = """<style>
.rse-jagged{font:12px/1.5 ui-monospace,Menlo,Consolas,monospace;color:inherit}
.rse-jagged .keys{display:flex;flex-wrap:wrap;gap:10px 22px;align-items:flex-start;margin-top:6px}
.rse-jagged .key{border-left:4px solid rgb(var(--c));padding-left:8px}
.rse-jagged .row{display:flex;align-items:center;gap:2px;min-height:22px;margin:2px 0}
.rse-jagged .number{opacity:.65;min-width:2.2em;text-align:right;margin-right:6px}
.rse-jagged .cell{background:rgba(var(--c),.28);border:1px solid rgb(var(--c));border-radius:3px;padding:0 5px;
 text-align:center;white-space:nowrap}
.rse-jagged .cell small{display:block;line-height:1.1;opacity:.8;border-top:1px dotted rgb(var(--c))}
.rse-jagged .none{border:1px dashed;border-radius:3px;padding:0 5px;opacity:.65}
.rse-jagged .more{opacity:.75;font-style:italic;padding-left:4px;white-space:nowrap}
.rse-jagged table{border-collapse:separate;border-spacing:2px;margin-top:6px;font:inherit;color:inherit}
.rse-jagged table th,.rse-jagged table td{background:none;text-align:center;padding:0 5px;color:inherit}
.rse-jagged table td.cell{background:rgba(var(--c),.28);border:1px solid rgb(var(--c))}
.rse-jagged table th.head{border-bottom:4px solid rgb(var(--c))}
</style>"""


def jagged_html(jt: JaggedTensor) -> str:
    """A JaggedTensor: one line of cells per row."""
    num_rows = _num_rows(jt)
    title = f"<b>JaggedTensor</b> {_count(num_rows, 'rows')}, {_about(jt.values(), jt.weights_or_none())}"
    if jt.values().is_meta:
        return _page(title, _no_data())
    shown = min(num_rows, MAX_ROWS)
    # host sync: drawing needs the numbers
    offsets = jt.offsets()[: shown + 1].tolist()
    rows = "".join(_rows(jt.values(), jt.weights_or_none(), offsets))
    return _page(title, f'<div class="keys">{_key_block(COLOURS[0], "", rows, num_rows - shown)}</div>')


def keyed_jagged_html(kjt: KeyedJaggedTensor) -> str:
    """A KeyedJaggedTensor: one block per key, and in it one line of cells per row."""
    keys = kjt.keys()
    title = f"<b>KeyedJaggedTensor</b> {_count(len(keys), 'keys')}, {_stride_words(kjt)}, "
    title += _about(kjt.values(), kjt.weights_or_none())
    if kjt.values().is_meta:
        return _page(title, _no_data())
    starts, counts = kjt.lengths_offset_per_key(), kjt.length_per_key()
    per_rank = kjt.stride_per_key_per_rank()
    max_rows = MAX_ROWS if len(keys) <= 3 else MAX_ROWS_OF_MANY_KEYS
    blocks = []
    for index, key in enumerate(keys[:MAX_KEYS]):
        num_rows = starts[index + 1] - starts[index]
        shown = min(num_rows, max_rows)
        # host sync: drawing needs the numbers
        offsets = kjt.offsets()[starts[index] : starts[index] + shown + 1].tolist()
        rows = "".join(_rows(kjt.values(), kjt.weights_or_none(), offsets))
        note = f"{_count(counts[index], 'values')} in {_count(num_rows, 'rows')}"
        if per_rank:
            note += f", by rank {per_rank[index]}" if len(per_rank[index]) > 1 else ""
        head = f"<b>{escape(key)}</b> <span class='more'>{escape(note)}</span>"
        blocks.append(_key_block(COLOURS[index % len(COLOURS)], head, rows, num_rows - shown))
    if len(keys) > MAX_KEYS:
        blocks.append(_more(len(keys) - MAX_KEYS, "keys"))
    return _page(title, f'<div class="keys">{"".join(blocks)}</div>')


def keyed_html(keyed: KeyedTensor) -> str:
    """A KeyedTensor: its values as a matrix, the columns of each key under its name."""
    keys, widths, values = keyed.keys(), keyed.length_per_key(), keyed.values()
    title = f"<b>KeyedTensor</b> {_count(len(keys), 'keys')} side by side along dim {keyed.key_dim()}, "
    title += escape(f"shape {list(values.shape)}, {values.dtype} on {values.device}")
    if values.is_meta:
        return _page(title, _no_data())
    if keyed.key_dim() != 1 or values.dim() != 2:
        return _page(title, escape(repr(keyed)))
    num_rows = min(values.size(0), MAX_ROWS)
    head = ["<th></th>"]
    lines: list[list[str]] = [[f'<td class="number">{row}</td>'] for row in range(num_rows)]
    for index, (key, width) in enumerate(zip(keys[:MAX_KEYS], widths)):
        colour = COLOURS[index % len(COLOURS)]
        shown = min(width, MAX_COLUMNS)
        span = shown + (width > shown)
        name = f'{escape(key)} <span class="more">{width}</span>'
        head.append(f'<th class="head" colspan="{span}" style="--c:{colour}">{name}</th>')
        # host sync: drawing needs the numbers
        numbers = keyed[key][:num_rows, :shown].tolist()
        for line, row in zip(lines, numbers):
            line += [f'<td class="cell" style="--c:{colour}">{_number(number)}</td>' for number in row]
            line += [f'<td class="more">+{width - shown}</td>'] if width > shown else []
    if len(keys) > MAX_KEYS:
        head.append(f"<th>{_more(len(keys) - MAX_KEYS, 'keys')}</th>")
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    below = _more(values.size(0) - num_rows, "rows") if values.size(0) > num_rows else ""
    return _page(title, f"<table><tr>{''.join(head)}</tr>{body}</table>{below}")


def _rows(values: Tensor, weights: Tensor | None, offsets: list[int]) -> Iterator[str]:
    """One line of cells for each two consecutive offsets."""
    for number, (start, end) in enumerate(zip(offsets, offsets[1:])):  # noqa: RUF007
        cut = min(end, start + MAX_CELLS)
        # host sync: drawing needs the numbers
        shown = values[start:cut].tolist()
        shown_weights = [None] * len(shown) if weights is None else weights[start:cut].tolist()
        cells = [_cell(value, weight) for value, weight in zip(shown, shown_weights)]
        cells = cells or ['<span class="none">empty</span>']
        if end > cut:
            cells.append(_more(end - cut, "values"))
        yield f'<div class="row"><span class="number">{number}</span>{"".join(cells)}</div>'


def _cell(value: object, weight: float | None) -> str:
    below = "" if weight is None else f'<small title="weight">&times;{_number(weight)}</small>'
    return f'<span class="cell">{_number(value)}{below}</span>'


def _number(value: object) -> str:
    if isinstance(value, list):  # values of more than one dimension: the first few numbers of each
        return escape("[" + ", ".join(_number(part) for part in value[:3]) + (", …]" if len(value) > 3 else "]"))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _key_block(colour: str, head: str, rows: str, num_hidden_rows: int) -> str:
    hidden = _more(num_hidden_rows, "rows") if num_hidden_rows > 0 else ""
    return f'<div class="key" style="--c:{colour}">{head}{rows}{hidden}</div>'


def _more(count: int, what: str) -> str:
    return f'<span class="more">&hellip; {_count(count, f"more {what}")}</span>'


def _count(count: int, what: str) -> str:
    return f"{count} {what.removesuffix('s') if count == 1 else what}"


def _stride_words(kjt: KeyedJaggedTensor) -> str:
    if not kjt.variable_stride_per_key():
        return f"stride {kjt.stride()} (rows per key)"
    full = f", full batch {kjt.stride()} by inverse indices" if kjt.inverse_indices_or_none() is not None else ""
    return f"variable stride per key{full}"


def _num_rows(jt: JaggedTensor) -> int:
    lengths, offsets = jt.lengths_or_none(), jt.offsets_or_none()
    return lengths.numel() if lengths is not None else max(offsets.numel() - 1, 0)


def _about(values: Tensor, weights: Tensor | None) -> str:
    weighted = ", weighted" if weights is not None else ""
    shape = "" if values.dim() == 1 else f" of shape {list(values.shape)}"
    return escape(f"{_count(values.size(0), 'values')}{shape}, {values.dtype} on {values.device}{weighted}")


def _no_data() -> str:
    return '<div class="more">a meta tensor has no data to show</div>'


def _page(title: str, body: str) -> str:
    return f'<div class="rse-jagged">{STYLE}{title}{body}</div>'
