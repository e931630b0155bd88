"""Style and behaviour of the page: light and dark, a phone and a desk, and paper."""

_LIGHT = """
--page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #566273; --rule: #dfe4ea; --grid: #e8ecf1; --row: #f3f6fa;
--accent: #2458c5; --mark: #eaf1ff; --code: #f1f4f8; --good: #17753f; --warn: #92600a; --bad: #b3261e;
--c0: #2458c5; --c1: #c8550f; --c2: #1c8a5a; --c3: #7a48c0; --c4: #b5306d; --c5: #0d7f93; --c6: #8a6a00; --muted: #a3adba;
--noise: #c9d2de80; color-scheme: light;
"""
_DARK = """
--page: #10151c; --card: #18202a; --ink: #e8edf3; --soft: #9dabbc; --rule: #2c3744; --grid: #263140; --row: #1e2833;
--accent: #82adff; --mark: #1d2c47; --code: #111923; --good: #6fd39b; --warn: #eab95c; --bad: #ff8f86;
--c0: #7ca9ff; --c1: #ff9a57; --c2: #58cf98; --c3: #b796f5; --c4: #f384b4; --c5: #4fc6d9; --c6: #dcb73f; --muted: #64748a;
--noise: #41506480; color-scheme: dark;
"""
_COLOURS = "".join(f".c-{n}{{--hue:var(--c{n})}}" for n in range(7))

CSS = (
    f"""
:root {{{_LIGHT}}}
@media (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}
@media print {{ :root {{{_LIGHT}}} }}
{_COLOURS}
.c-muted{{--hue:var(--muted)}} .c-good{{--hue:var(--good)}} .c-bad{{--hue:var(--bad)}}
.front{{--hue:var(--soft)}} .zero{{--hue:var(--soft)}} .noise{{--hue:var(--noise)}}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 64px; }
header .kind { color: var(--soft); font-size: .875rem; }
h1 { font-size: clamp(1.35rem, 1rem + 1.6vw, 2.05rem); line-height: 1.25; margin: .35em 0 .5em; letter-spacing: -.012em;
  text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.22rem; line-height: 1.3; margin: 2.4rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 75ch; }
a { color: var(--accent); }
.note { color: var(--soft); font-size: .875rem; }
.state { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; font-size: .82rem; font-weight: 600;
  border: 1.5px solid currentColor; margin-left: .5rem; white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .quiet { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin: 1.1rem 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: .8rem; } .tiles dd { margin: 0; font-size: 1.3rem; font-weight: 650;
  font-variant-numeric: tabular-nums; line-height: 1.35; overflow-wrap: anywhere; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.command { position: relative; background: var(--code); border: 1px solid var(--rule); border-radius: 10px; margin: .6rem 0; }
.command pre { margin: 0; padding: 14px 92px 14px 16px; white-space: pre-wrap; overflow-wrap: anywhere; }
.command span { display: inline-block; max-width: 100%; }
code, pre { font: .875rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.copy { position: absolute; top: 9px; right: 9px; font: 600 .82rem/1 inherit; font-family: inherit;
  padding: 8px 12px; cursor: pointer;
  color: var(--accent); background: var(--card); border: 1px solid var(--rule); border-radius: 7px; }
.copy:hover { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:nth-child(even) td { background: var(--row); }
tbody tr.mark td { background: var(--mark); font-weight: 600; }
thead th { font-weight: 600; color: var(--soft); white-space: nowrap; }
.num { text-align: right; white-space: nowrap; }
td.text { min-width: 9rem; overflow-wrap: anywhere; }
td.text code { font-size: .84rem; }
.scroll.long { max-height: min(44rem, 80vh); overflow: auto; }
.long thead th { position: sticky; top: 0; background: var(--card); box-shadow: 0 1px 0 var(--rule); }
.runs td:nth-child(2) { min-width: 12rem; }
.runs td:last-child { min-width: 18rem; }
.places td:nth-child(2) { min-width: 11rem; } .places td:nth-child(5) { min-width: 15rem; }
th button { all: unset; cursor: pointer; color: inherit; font: inherit; }
th button:focus-visible { outline: 2px solid var(--accent); border-radius: 3px; }
th button::after { content: "\\2195"; opacity: .4; padding-left: .3em; font-size: .85em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.thirds { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px 12px;
  min-width: 0; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 650; margin-bottom: 6px; }
figure .note { margin: .5rem 0 0; font-size: .82rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible; }
.narrow { display: none; }
svg text { font-size: 12px; fill: var(--ink); }
svg .tick { font-size: 11px; fill: var(--soft); }
svg .axis-label { font-size: 11.5px; fill: var(--soft); }
svg .mark-label { font-size: 11.5px; font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round; }
.grid { stroke: var(--grid); fill: none; } .axis { stroke: var(--soft); fill: none; }
.line { stroke: var(--hue); stroke-width: 1.9; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line.thin { stroke-width: 1.3; opacity: .8; } .line.c-muted { stroke-width: 1.2; opacity: .7; }
.line.dashed { stroke-dasharray: 6 4; }
.line.front { stroke-width: 1.5; stroke-dasharray: 3 4; } .line.zero { stroke-width: 1; }
.dot { fill: var(--hue); stroke: var(--card); stroke-width: 1.2; }
.dot.hollow { fill: var(--card); stroke: var(--hue); stroke-width: 1.8; }
.dot:hover, .line:hover { filter: brightness(1.25); stroke-width: 3; }
.band { fill: var(--hue); stroke: none; }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 0; padding: 0;
  font-size: .82rem; color: var(--soft); }
.keys li { display: flex; align-items: center; gap: 7px; }
.key { flex: none; width: 11px; height: 11px; border-radius: 50%; background: var(--hue); }
.key.line { width: 20px; height: 0; border-radius: 0; border-top: 3px solid var(--hue); background: none; }
.key.dashed, .front.key { border-top-style: dashed; } .noise.key { height: 11px; border: 0; background: var(--hue); }
.key.ring { background: none; border: 2px solid var(--hue); }
.accounts { display: flex; height: 26px; border-radius: 8px; overflow: hidden; margin: 0 0 4px; gap: 1px; }
.accounts span { background: var(--hue); min-width: 1px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; align-items: start; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: .8rem 0; font-size: .9rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
ul.notes { padding-left: 1.2rem; max-width: 75ch; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .82rem; }
@media (max-width: 620px) {
  main { padding: 18px 14px 48px; }
  .broad { display: none; } .narrow { display: block; }
  .command pre { padding: 48px 14px 14px; } .places td:nth-child(2) { min-width: 9rem; }
  th, td { padding: 6px 9px; } table { font-size: .84rem; }
  figure { padding: 12px 10px 10px; }
  .stack thead { display: none; }
  .stack, .stack tbody { display: block; }
  .stack tr { display: block; padding: 8px 2px; border-bottom: 1px solid var(--rule); }
  .stack tr:last-child { border: 0; }
  .stack tbody tr:nth-child(even) { background: var(--row); }
  .stack tbody tr.mark { background: var(--mark); }
  .stack td, .stack tbody tr:nth-child(even) td, .stack tbody tr.mark td {
    display: grid; grid-template-columns: 6.6rem minmax(0, 1fr); gap: 8px; border: 0; padding: 2px 10px;
    text-align: left; white-space: normal; background: none; min-width: 0;
  }
  .stack td::before { content: attr(data-label); color: var(--soft); font-weight: 400; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .5rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } .tiles dd { font-size: 1.12rem; }
}
@media print {
  @page { margin: 14mm; }
  body { background: #fff; font-size: 10pt; } main { max-width: none; padding: 0; }
  .copy, th button::after { display: none; } .scroll, .scroll.long { overflow: visible; border: 0; max-height: none; }
  .long thead th { position: static; box-shadow: none; } table { font-size: 8.2pt; }
  th, td { padding: 3px 5px; } .runs td:last-child, td.text { min-width: 0; }
  .runs td:nth-child(2), .places td:nth-child(2) { min-width: 8.5rem; } td.text code { font-size: 8pt; }
  .pictures, .two { grid-template-columns: 1fr 1fr; gap: 10px; }
  .thirds { grid-template-columns: 1fr 1fr 1fr; } figure.wide { grid-column: 1 / -1; }
  h2 { break-after: avoid; } tr, .command { break-inside: avoid; } thead { display: table-header-group; }
  .command pre { padding-right: 14px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)

SCRIPT = """
document.querySelectorAll('.copy').forEach(button => button.addEventListener('click', async () => {
  const code = button.parentElement.querySelector('code'), said = button.textContent;
  try { await navigator.clipboard.writeText(code.textContent); button.textContent = 'Copied'; }
  catch { const range = document.createRange(); range.selectNodeContents(code);
    const chosen = getSelection(); chosen.removeAllRanges(); chosen.addRange(range); button.textContent = 'Press Ctrl+C'; }
  setTimeout(() => { button.textContent = said; }, 1800);
}));
document.querySelectorAll('table.sortable').forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.textContent = head.textContent; button.title = 'sort by ' + head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.value ?? '';
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === '' || y === '') return (x === '') - (y === '');
        const order = head.classList.contains('num') ? x - y : x.localeCompare(y, 'en', {numeric: true});
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
});
"""
