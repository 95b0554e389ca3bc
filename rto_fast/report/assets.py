"""Style and script of report.html; it needs nothing from elsewhere."""

CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content policy of the page: it can fetch nothing, whatever a sampled response may contain."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1c2330; --muted: #626d7f; --grid: #e3e6eb; --accent: #2f6fde;
  --neg: 226 96 38; --pos: 38 112 222; --warn: #b3541e;
  --c0: #2f6fde; --c1: #e2602b; --c2: #239a78; --c3: #8a5bd0; --c4: #c08a12; --c5: #c8427f; --c6: #4a90a4;
  --c7: #7a8293;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e6e9ef; --muted: #98a2b3; --grid: #2c333f; --accent: #74a4ff;
    --neg: 240 112 52; --pos: 66 134 245; --warn: #f0a36b;
    --c0: #74a4ff; --c1: #ff8f5c; --c2: #4fc9a4; --c3: #b794f4; --c4: #e2b146; --c5: #f07fb2; --c6: #7cc3d6;
    --c7: #a3acbd;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header { max-width: 1280px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.015em; text-wrap: balance; }
h2 { font-size: 19px; margin: 44px 0 12px; letter-spacing: -.01em; }
h3 { font-size: 14.5px; margin: 0; }
.subtitle { color: var(--muted); margin: 6px 0 0; }
nav { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0 0;
  padding: 0; }
.tile, .chart, .response, details.settings, .table { background: var(--card); border: 1px solid var(--grid);
  border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile dt { color: var(--muted); font-size: 13px; }
.tile dd { margin: 2px 0 0; font-size: 23px; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; overflow-wrap: anywhere; }
.tile small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; letter-spacing: 0; }
details.settings { margin-top: 14px; padding: 10px 16px; }
details.settings summary { cursor: pointer; color: var(--muted); }
.settings dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 0 28px;
  margin: 10px 0 4px; font-size: 13.5px; }
.settings dl > div { display: flex; justify-content: space-between; gap: 16px; padding: 3px 0;
  border-top: 1px solid var(--grid); }
.settings dt { color: var(--muted); } .settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.chart { margin: 0; padding: 14px 14px 6px; position: relative; display: flex; flex-direction: column; }
.chart figcaption p { margin: 1px 0 0; color: var(--muted); font-size: 12.5px; line-height: 1.4; }
.chart .plot { position: relative; margin-top: auto; padding-top: 6px; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.chart svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.legend { list-style: none; margin: 4px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 14px;
  font-size: 12.5px; color: var(--muted); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.tip { position: absolute; pointer-events: none; z-index: 5; background: var(--card); border: 1px solid var(--grid);
  border-radius: 7px; padding: 5px 9px; font-size: 12.5px; line-height: 1.45; white-space: nowrap;
  box-shadow: 0 4px 16px rgb(0 0 0 / .14); font-variant-numeric: tabular-nums; }
.tip b { font-weight: 600; } .tip i { display: inline-block; width: 9px; height: 9px; border-radius: 2px;
  margin-right: 5px; }
.cursor { stroke: var(--muted); stroke-width: .7; stroke-dasharray: 2 2; }
.table { overflow-x: auto; padding: 14px 16px; margin: 0 0 14px; }
.table p { color: var(--muted); font-size: 13px; margin: 8px 0 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { padding: 7px 12px; text-align: right; border-top: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.best th, tr.best td { font-weight: 650; color: var(--accent); }
.bar { position: sticky; top: 0; z-index: 4; background: var(--page); padding: 10px 0 12px;
  border-bottom: 1px solid var(--grid); margin-bottom: 16px; }
.switch { display: flex; flex-wrap: wrap; gap: 8px; border: 0; margin: 0; padding: 0; }
.switch legend { padding: 0; float: left; margin: 4px 6px 0 0; color: var(--muted); font-size: 13.5px; }
.switch label { border: 1px solid var(--grid); background: var(--card); border-radius: 999px; padding: 3px 14px;
  font-size: 13.5px; cursor: pointer; }
.switch input { position: absolute; opacity: 0; }
.switch label:has(:checked) { background: var(--accent); border-color: var(--accent); color: var(--card);
  font-weight: 600; }
.switch label:has(:focus-visible) { outline: 2px solid var(--accent); outline-offset: 2px; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin-top: 10px; font-size: 13px;
  color: var(--muted); }
.ramp { display: grid; grid-template-columns: auto 210px auto; gap: 8px; align-items: center; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.ramp i { height: 12px; border-radius: 6px; border: 1px solid var(--grid);
  background: linear-gradient(90deg, rgb(var(--neg) / .78), transparent 50%, rgb(var(--pos) / .78)), var(--card); }
.response { padding: 14px 18px 12px; margin-bottom: 14px; }
.response header { padding: 0; margin: 0; max-width: none; display: flex; flex-wrap: wrap; gap: 4px 18px;
  font-size: 13px; color: var(--muted); font-variant-numeric: tabular-nums; align-items: baseline; }
.response header b { color: var(--ink); font-weight: 600; }
.response .label { color: var(--accent); font-weight: 650; }
.response .cut { color: var(--warn); font-weight: 600; }
.prompt { margin: 8px 0 0; padding: 6px 12px; border-left: 3px solid var(--grid); color: var(--muted);
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; max-height: 12em; overflow-y: auto; }
.tokens { margin: 10px 0 0; line-height: 2; overflow-wrap: anywhere; }
.t { --a: 0; padding: 3px 0; border-radius: 3px; margin-right: 1px; cursor: default; white-space: pre-wrap;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.t.n { background: rgb(var(--neg) / var(--a)); } .t.p { background: rgb(var(--pos) / var(--a)); }
.t.x { background: repeating-linear-gradient(45deg, var(--grid) 0 3px, transparent 3px 6px); }
.t:hover, .t:focus { outline: 1.5px solid var(--ink); outline-offset: 0; }
.t u { text-decoration: none; opacity: .38; } .t.s { font: 12px ui-monospace, Menlo, Consolas, monospace;
  border: 1px dashed var(--muted); padding: 1px 4px; }
.readout { margin: 8px 0 0; min-height: 1.5em; font-size: 12.5px; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.empty { color: var(--muted); font-style: italic; }
footer { max-width: 1280px; margin: 36px auto 40px; padding: 0 24px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) { main, header, footer { padding-left: 14px; padding-right: 14px; }
  .ramp { grid-template-columns: auto 110px auto; } }
@media print { .bar { position: static; } .chart, .response, .tile { break-inside: avoid; } }
"""

JS = """
'use strict';
(() => {
  const minus = s => s.replace('-', '\\u2212');
  const text = v => v === null ? 'not finite' : minus(String(+v.toPrecision(4)));

  // Sampled responses: the colour of each token, and the figures of the one pointed at.
  const quantities = [...document.querySelectorAll('input[name=quantity]')];
  const tokens = [...document.querySelectorAll('.t')];
  const values = tokens.map(t => t.dataset.v.split(' ').map(Number));
  const show = input => {
    const k = +input.value, scale = +input.dataset.scale;
    tokens.forEach((t, i) => {
      const v = values[i][k];
      t.classList.toggle('n', v < 0);
      t.classList.toggle('p', v > 0);
      t.classList.toggle('x', Number.isNaN(v));
      t.style.setProperty('--a', Number.isNaN(v) ? 0 : Math.min(1, Math.abs(v) / scale) * 0.78);
    });
    document.getElementById('low').textContent = minus('≤ -' + input.dataset.limit);
    document.getElementById('high').textContent = '≥ +' + input.dataset.limit;
    document.getElementById('meaning').textContent = input.dataset.meaning;
  };
  quantities.forEach(q => q.addEventListener('change', () => show(q)));
  const checked = quantities.find(q => q.checked);
  if (checked) show(checked);

  document.querySelectorAll('.response').forEach(card => {
    const line = card.querySelector('.readout'), own = [...card.querySelectorAll('.t')], rest = line.textContent;
    const tell = t => { line.textContent = t ? t.title : rest; };
    card.addEventListener('mouseover', e => { const t = e.target.closest('.t'); if (t) tell(t); });
    card.addEventListener('focusin', e => { const t = e.target.closest('.t'); if (t) tell(t); });
    card.addEventListener('keydown', e => {
      const at = own.indexOf(document.activeElement);
      const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: own.length - 1}[e.key];
      if (at < 0 || to === undefined || !own[to]) return;
      e.preventDefault();
      own[at].tabIndex = -1;
      own[to].tabIndex = 0;
      own[to].focus();
    });
  });

  // Charts: the figures at the step under the pointer.
  document.querySelectorAll('.chart').forEach(chart => {
    const data = JSON.parse(chart.dataset.points), plot = chart.querySelector('.plot');
    const svg = plot.querySelector('svg'), view = svg.viewBox.baseVal, curves = data.curves;
    if (!curves.length) return;
    const svgNode = name => document.createElementNS(svg.namespaceURI, name);
    let tip, mark;
    const hide = () => { if (tip) { tip.remove(); mark.remove(); tip = mark = null; } };
    plot.addEventListener('pointerleave', hide);
    plot.addEventListener('pointermove', e => {
      const box = svg.getBoundingClientRect(), unit = view.width / box.width;
      const px = (e.clientX - box.left) * unit;
      if (px < data.box[0] - 8 || px > data.box[2] + 8) return hide();
      const wanted = (px - data.x[0]) / data.x[1];
      const nearest = c => c.x.reduce((b, x, i) => Math.abs(x - wanted) < Math.abs(c.x[b] - wanted) ? i : b, 0);
      hide();
      tip = document.createElement('div');
      tip.className = 'tip';
      mark = svgNode('g');
      const at = nearest(curves[0]), x = curves[0].x[at], cx = data.x[0] + data.x[1] * x;
      const line = svgNode('line');
      for (const [k, v] of Object.entries({x1: cx, x2: cx, y1: data.box[1], y2: data.box[3], class: 'cursor'}))
        line.setAttribute(k, v);
      mark.append(line);
      const head = document.createElement('div');
      head.textContent = data.label + ' ' + text(x);
      tip.append(head);
      curves.forEach(c => {
        const i = nearest(c), row = document.createElement('div'), dot = document.createElement('i');
        const figure = document.createElement('b');
        dot.style.background = `var(--c${c.c})`;
        figure.textContent = text(c.y[i]);
        row.append(dot, c.n + ' ', figure);
        tip.append(row);
        const y = (c.top || c.y)[i];
        if (y === null) return;
        const spot = svgNode('circle');
        const place = {cx: data.x[0] + data.x[1] * c.x[i], cy: data.y[0] + data.y[1] * y, r: 3};
        for (const [k, v] of Object.entries(place)) spot.setAttribute(k, v);
        spot.style.fill = `var(--c${c.c})`;
        mark.append(spot);
      });
      svg.append(mark);
      plot.append(tip);
      const left = cx / unit + 12, edge = document.documentElement.clientWidth;  // beside the dots, never over them
      const over = box.left + left + tip.offsetWidth > edge;
      tip.style.left = (over ? cx / unit - 12 - tip.offsetWidth : left) + 'px';
      tip.style.top = '8px';
    });
  });
})();
"""
