// The page of composition_routes_html(): a fixed document that draws the JSON put into it.
#include "moesaic/eval/composition_routes.h"
#include "moesaic/eval/page.h"

namespace moesaic::eval {
namespace {

constexpr const char* kHead = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Moesaic: what the anchor reads</title>
<style>
  :root { color-scheme: light dark; --ink: #1d2433; --soft: #5d6779; --line: #dfe3ea; --page: #f5f6f9; --card: #ffffff; --accent: #b4540a; --unseen: #e9ebf0; --hatch: #c9ced8; --tip: #1d2433; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --soft: #9aa5b8; --line: #313a4a; --page: #12161d; --card: #1a202a; --accent: #ffa657; --unseen: #222936; --hatch: #3a4455; --tip: #05070b; } }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
  h1 { font-size: 26px; margin: 0 0 2px; }
  h2 { font-size: 18px; margin: 0 0 2px; }
  h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 14px 0 4px; overflow-wrap: anywhere; }
  p.note { margin: 0 0 14px; color: var(--soft); max-width: 90ch; }
  .facts { color: var(--soft); margin-bottom: 10px; overflow-wrap: anywhere; }
  .facts b { color: var(--ink); font-weight: 600; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
  .controls { position: sticky; top: 0; z-index: 5; background: var(--page); padding: 10px 0; display: flex; gap: 8px 18px; flex-wrap: wrap; }
  label { color: var(--soft); }
  select { font: inherit; max-width: 100%; padding: 4px 8px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); color: var(--ink); }
  table { border-collapse: separate; border-spacing: 2px; }
  th { font-weight: 500; font-size: 13px; color: var(--soft); padding: 0 6px; text-align: center; white-space: nowrap; }
  th.row { text-align: right; color: var(--ink); }
  th.up { writing-mode: vertical-rl; transform: rotate(180deg); text-align: right; padding: 4px 0; font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-weight: 400; max-height: 130px; overflow: hidden; }
  th.up, td.cell { cursor: pointer; }
  td { height: 28px; text-align: center; font-size: 12px; border-radius: 4px; font-variant-numeric: tabular-nums; }
  td.cell { min-width: 18px; width: 22px; }
  td.value { min-width: 70px; }
  .chosen { outline: 2px solid var(--accent); outline-offset: -1px; }
  th.chosen { color: var(--ink); }
  .text { line-height: 2.1; font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
  .text span { padding: 3px 1px; border-radius: 3px; margin-right: 2px; }
  .text.anchor span { cursor: pointer; }
  .unseen { color: var(--soft); background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, transparent 1px 6px); }
  .legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 18px; font-size: 12px; color: var(--soft); margin-top: 10px; }
  .legend i { display: inline-block; width: 120px; height: 12px; border-radius: 6px; margin: 0 6px; vertical-align: -2px; }
  .legend i.unseen { width: 22px; border: 1px solid var(--line); border-radius: 3px; }
  .maps { display: flex; flex-wrap: wrap; gap: 12px 16px; margin-top: 14px; }
  .maps figure { margin: 0; cursor: pointer; padding: 4px; border-radius: 6px; }
  .maps figcaption { font-size: 12px; color: var(--soft); text-align: center; }
  canvas { display: block; }
  #status { min-height: 3em; margin: 10px 0 0; color: var(--soft); }
  #status b { color: var(--ink); font-weight: 600; }
  #tip { position: fixed; display: none; background: var(--tip); color: #fff; font-size: 12px; padding: 6px 9px; border-radius: 6px; pointer-events: none; z-index: 9; max-width: 320px; }
  .scroll { overflow-x: auto; }
  #blocks { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 8px 30px; }
  svg text { fill: var(--soft); font-size: 12px; }
  svg .block { fill: var(--unseen); stroke: var(--line); }
  svg .joined { fill: var(--card); stroke: var(--ink); }
  svg .join { cursor: pointer; }
  @media (max-width: 600px) { main { padding: 18px 12px 40px; } section { padding: 14px 12px; } }
</style>
</head>
<body>
<main>
<h1>What the anchor reads</h1>
<div class="facts" id="facts"></div>
<div class="controls">
  <label>Connection <select id="connection"></select></label>
  <label>Head <select id="head"></select></label>
</div>
<section><h2>Which blocks are joined</h2>
  <p class="note">A connection reads behind a block of an augmenting model (left) and adds behind a block of the anchor (right); blocks count from 0, "emb" is the embedding. The thicker the line, the more it adds: |Y| / |H|, what is added relative to the anchor's own states<span id="of"></span>. Choose one by a click.</p>
  <div class="scroll" id="blocks"></div></section>
<section id="tasks_section"><h2>By task</h2>
  <p class="note">Means over the tokens of questions with their answers. The entropy is a share of its largest value: 1 looks everywhere alike, 0 at one place. The first position is where attention rests that looks for nothing.</p>
  <label>Show <select id="metric"><option value="added">what is added, |Y| / |H|</option><option value="entropy_share">entropy of the attention</option><option value="first_share">weight on the first position</option></select></label>
  <div class="scroll" id="tasks" style="margin-top:12px"></div></section>
<div id="text_sections">
<section><h2>What each connection adds, token by token</h2>
  <p class="note">|Y| / |H| at each of the anchor's tokens. Choose a token and a connection by a click.</p>
  <div class="scroll" id="added"></div><div class="legend" id="added_scale"></div></section>
<section><h2>Who reads what</h2>
  <p class="note">Point at a token of the anchor, or choose one by a click, to see where its weights lie in the augmenting model's text. A token is hatched where its text was not known, or not yet cut into tokens for certain, when the anchor's token was written.</p>
  <h3 id="anchor_name"></h3><div class="text anchor" id="anchor_text"></div>
  <h3 id="aug_name"></h3><div class="text" id="aug_text"></div>
  <p id="status"></p><div class="legend" id="weight_scale"></div></section>
<section><h2>All weights</h2>
  <p class="note">A row is a token of the anchor, a column one of the augmenting model; the stairs are what may be seen. Below: every head, then the other connections.</p>
  <div class="scroll"><canvas id="matrix"></canvas></div>
  <h3>Heads of this connection</h3><div class="maps" id="heads"></div>
  <div id="others_part"><h3>Connections, mean over heads</h3><div class="maps" id="others"></div></div></section>
</div>
</main>
<div id="tip"></div>
<script id="data" type="application/json">)html";

constexpr const char* kTail = R"html(const dark = matchMedia('(prefers-color-scheme: dark)');
const text = data.text, joins = data.connections, names = Object.keys(data.tasks);
const state = { connection: 0, head: -1, token: text ? text.tokens.length - 1 : 0 };

// From the card's colour to a strong blue.
const ramp = () => dark.matches ? [[30, 37, 49], [29, 58, 102], [36, 87, 160], [66, 128, 210], [128, 178, 240], [214, 231, 255]] : blues;
const shade = x => between(ramp(), x);
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const paint = (e, x) => { const c = shade(x); e.style.background = css(c); e.style.color = inkOn(c); };

function showTip(event, line) { const t = el('tip'); t.textContent = line; t.style.display = 'block'; t.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - t.offsetWidth - 8)) + 'px'; t.style.top = Math.min(event.clientY + 14, innerHeight - t.offsetHeight - 8) + 'px'; }
const hideTip = () => { el('tip').style.display = 'none'; };
const tip = (e, line) => { e.onmousemove = event => showTip(event, line); e.onmouseleave = hideTip; };

const block = i => i < 0 ? 'emb' : String(i);
const word = token => token === '' ? '\u2026' : token.replace(/\n/g, '\u21b5');
const quoted = token => token === '' ? 'part of a character' : '\u201c' + (word(token).trim() || '\u2423') + '\u201d';
const base = path => path.split('/').filter(part => part).pop() || 'model';
const label = k => (data.augmenting.length > 1 ? base(data.augmenting[joins[k].augmenting].model) + ': ' : '') + `block ${block(joins[k].aug)} \u2192 ${block(joins[k].anchor)}`;
const streamOf = k => text.streams[joins[k].augmenting];
const stop = v => v >= 0.995 || v < 0.0005 ? v.toFixed(2) : v.toFixed(3);

const means = new Map();
/// Weights [T][visible] of a head, or their mean over heads (head -1).
function weights(k, head) {
  const all = text.connections[k].weights;
  if (head >= 0) return all[head];
  if (!means.has(k)) means.set(k, all[0].map((row, t) => row.map((_, s) => all.reduce((sum, h) => sum + h[t][s], 0) / all.length)));
  return means.get(k);
}

/// Mean of what each connection adds, over the text or else over all tasks' tokens.
const usual = joins.map((_, k) => {
  if (text) return text.connections[k].added.reduce((a, b) => a + b, 0) / text.tokens.length;
  const tokens = names.reduce((n, t) => n + data.tasks[t].tokens, 0);
  return names.reduce((n, t) => n + data.tasks[t].tokens * data.tasks[t].connections[k].added, 0) / tokens;
});

function drawBlocks() {
  const most = Math.max(...usual, 1e-9), wide = 500, tallest = Math.max(data.anchor.blocks, ...data.augmenting.map(a => a.blocks));
  const step = Math.max(13, Math.min(26, Math.floor(480 / tallest))), short = name => name.length > 30 ? name.slice(0, 29) + '\u2026' : name;
  el('blocks').replaceChildren(...data.augmenting.map((model, m) => {
    const mine = joins.map((j, k) => [j, k]).filter(([j]) => j.augmenting === m);
    const low = Math.min(0, ...mine.map(([j]) => Math.min(j.aug, j.anchor))), rows = Math.max(model.blocks, data.anchor.blocks) - low;
    const y = i => 34 + (rows - 1 - (i - low)) * step + step / 2;
    const chart = svg('svg', { viewBox: `0 0 ${wide} ${44 + rows * step}`, width: wide, style: 'max-width:100%;height:auto' });
    const column = (x, title, blocks, used, anchor) => {
      chart.append(svg('text', { x: x + 35, y: 18, 'text-anchor': 'middle' }, short(title)));
      for (let i = low; i < blocks; i++) {
        if (i < 0 && !used.has(i)) continue;
        chart.append(svg('rect', { x, y: y(i) - (step - 4) / 2, width: 70, height: step - 4, rx: 4, class: used.has(i) ? 'joined' : 'block' }), svg('text', { x: x + 35, y: y(i) + 4, 'text-anchor': 'middle' }, block(i)));
      }
    };
    column(70, base(model.model), model.blocks, new Set(mine.map(([j]) => j.aug)));
    column(345, base(data.anchor.model), data.anchor.blocks, new Set(mine.map(([j]) => j.anchor)));
    for (const [j, k] of mine) {
      const path = `M140 ${y(j.aug)} C 220 ${y(j.aug)} 260 ${y(j.anchor)} 340 ${y(j.anchor)}`, chosen = k === state.connection;
      const line = svg('path', { d: path, fill: 'none', stroke: chosen ? variable('--accent') : css(shade(0.62)), 'stroke-width': 1.5 + 8 * usual[k] / most, 'stroke-linecap': 'round', class: 'join' });
      line.onclick = () => { state.connection = k; draw(); };
      tip(line, `${label(k)}: adds ${usual[k].toFixed(3)} of |H|`);
      chart.append(line);
    }
    return chart;
  }));
}

function drawTasks() {
  const metric = el('metric').value, value = (t, k) => data.tasks[names[t]].connections[k][metric];
  const all = names.flatMap((_, t) => joins.map((_, k) => value(t, k))), high = metric === 'added' ? Math.max(...all, 1e-9) : 1;
  const table = make('table', {}, make('tr', {}, make('th'), ...joins.map((_, k) => make('th', { textContent: label(k) }))));
  names.forEach((name, t) => table.append(make('tr', {}, make('th', { className: 'row', textContent: name }), ...joins.map((_, k) => {
    const cell = make('td', { className: 'value', textContent: value(t, k).toFixed(3) }); paint(cell, value(t, k) / high); return cell;
  }))));
  el('tasks').replaceChildren(table);
}

const addedMost = text ? Math.max(...text.connections.flatMap(c => c.added), 1e-9) : 0;
function drawAdded() {
  const table = make('table');
  joins.forEach((_, k) => table.append(make('tr', {}, make('th', { className: 'row' + (k === state.connection ? ' chosen' : ''), textContent: label(k) }), ...text.tokens.map((token, t) => {
    const v = text.connections[k].added[t], cell = make('td', { className: 'cell' + (k === state.connection && t === state.token ? ' chosen' : '') });
    paint(cell, v / addedMost); tip(cell, `${quoted(token)}, ${label(k)}: ${stop(v)}`);
    cell.onclick = () => { state.connection = k; state.token = t; draw(); };
    return cell;
  }))));
  table.append(make('tr', {}, make('th'), ...text.tokens.map((token, t) => {
    const th = make('th', { className: 'up' + (t === state.token ? ' chosen' : ''), textContent: word(token).trim() || '\u2423' });
    th.onclick = () => { state.token = t; draw(); };
    return th;
  })));
  el('added').replaceChildren(table);
  const bar = make('i'); bar.style.background = gradient();
  el('added_scale').replaceChildren(make('span', {}, '0', bar, addedMost.toFixed(3)));
}
const gradient = () => `linear-gradient(90deg, ${ramp().map(css).join(',')})`;

/// Weights are shown by their square root: most are small.
const strength = w => Math.sqrt(w);

function drawReading(token) {
  const k = state.connection, stream = streamOf(k), row = weights(k, state.head)[token], seen = stream.visible[token];
  [...el('anchor_text').children].forEach((span, t) => span.classList.toggle('chosen', t === token));
  [...el('aug_text').children].forEach((span, s) => {
    const visible = s < seen;
    span.className = visible ? '' : 'unseen';
    span.style.background = span.style.color = '';
    if (visible) paint(span, strength(row[s]));
    tip(span, `${quoted(stream.tokens[s])}: ${visible ? stop(row[s]) : 'not seen from ' + quoted(text.tokens[token])}`);
  });
  const best = row.map((w, s) => [w, s]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w >= 0.05);
  el('status').replaceChildren(make('b', { textContent: quoted(text.tokens[token]) }), ` (token ${token}) sees ${seen} of ${stream.tokens.length}`,
    ...(seen ? [', reads ', ...best.flatMap(([w, s], i) => [i ? ', ' : '', make('b', { textContent: quoted(stream.tokens[s]) }), ` ${w.toFixed(2)}`])] : []),
    `; the connection adds ${stop(text.connections[k].added[token])} of |H|.`);
}

function drawText() {
  const k = state.connection;
  el('anchor_name').textContent = `The anchor, ${base(data.anchor.model)}: ${text.tokens.length} tokens, coloured by what the connection adds`;
  el('aug_name').textContent = `The augmenting model, ${base(data.augmenting[joins[k].augmenting].model)}: ${streamOf(k).tokens.length} tokens, coloured by the weights`;
  el('anchor_text').replaceChildren(...text.tokens.map((token, t) => {
    const span = make('span', { textContent: word(token) });
    paint(span, text.connections[k].added[t] / addedMost);
    span.onmouseenter = () => drawReading(t);
    span.onclick = () => { state.token = t; draw(); };
    return span;
  }));
  el('anchor_text').onmouseleave = () => drawReading(state.token);
  el('aug_text').replaceChildren(...streamOf(k).tokens.map(token => make('span', { textContent: word(token) })));
  drawReading(state.token);
  const bar = make('i'); bar.style.background = gradient();
  el('weight_scale').replaceChildren(make('span', {}, 'weight 0', bar, '1 (by its square root)'), make('span', {}, make('i', { className: 'unseen' }), 'not seen'));
}

/// Draws a map of weights with square cells; labels where there is room.
function drawMap(canvas, k, head, cell, labels) {
  const rows = weights(k, head), stream = streamOf(k), columns = stream.tokens.length, ratio = devicePixelRatio || 1;
  const named = labels && cell >= 11, left = named ? 96 : 0, top = named ? 84 : 0, width = left + Math.max(1, columns) * cell, height = top + rows.length * cell;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
  const g = canvas.getContext('2d');
  g.scale(ratio, ratio);
  const gap = cell >= 6 ? 1 : 0;
  g.fillStyle = variable('--unseen'); g.fillRect(left, top, columns * cell, rows.length * cell);
  g.strokeStyle = variable('--hatch'); g.lineWidth = 1;
  g.save(); g.beginPath(); g.rect(left, top, columns * cell, rows.length * cell); g.clip();
  for (let x = -rows.length * cell; x < columns * cell; x += 7) { g.beginPath(); g.moveTo(left + x, top + rows.length * cell); g.lineTo(left + x + rows.length * cell, top); g.stroke(); }
  g.restore();
  rows.forEach((row, t) => { if (row.length) { g.fillStyle = variable('--card'); g.fillRect(left, top + t * cell, row.length * cell, cell); }
    row.forEach((w, s) => { g.fillStyle = css(shade(strength(w))); g.fillRect(left + s * cell, top + t * cell, cell - gap, cell - gap); }); });
  if (labels) {
    g.font = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace'; g.textBaseline = 'middle';
    const short = token => { const w = word(token).trim() || '\u2423'; return w.length > 11 ? w.slice(0, 10) + '\u2026' : w; };
    if (named) {
      text.tokens.forEach((token, t) => { g.fillStyle = variable(t === state.token ? '--ink' : '--soft'); g.textAlign = 'right'; g.fillText(short(token), left - 6, top + (t + 0.5) * cell); });
      g.fillStyle = variable('--soft'); g.textAlign = 'left';
      stream.tokens.forEach((token, s) => { g.save(); g.translate(left + (s + 0.5) * cell, top - 6); g.rotate(-Math.PI / 2); g.fillText(short(token), 0, 0); g.restore(); });
    }
    g.strokeStyle = variable('--accent'); g.lineWidth = 2;
    g.strokeRect(left + 1, top + state.token * cell, Math.max(1, columns) * cell - 2, cell);
  }
  return { left, top };
}

function drawMatrix() {
  const k = state.connection, stream = streamOf(k), rows = weights(k, state.head), canvas = el('matrix');
  const cell = Math.max(3, Math.min(22, Math.floor(1000 / Math.max(stream.tokens.length, 1)), Math.floor(1000 / text.tokens.length)));
  const { left, top } = drawMap(canvas, k, state.head, cell, true);
  const place = event => { const box = canvas.getBoundingClientRect(); return [Math.floor((event.clientY - box.top - top) / cell), Math.floor((event.clientX - box.left - left) / cell)]; };
  canvas.onmousemove = event => {
    const [t, s] = place(event);
    if (t < 0 || t >= text.tokens.length || s < 0 || s >= stream.tokens.length) { hideTip(); return; }
    showTip(event, `${quoted(text.tokens[t])} reads ${quoted(stream.tokens[s])}: ${s < rows[t].length ? stop(rows[t][s]) : 'not seen'}`);
  };
  canvas.onmouseleave = hideTip;
  canvas.onclick = event => { const [t] = place(event); if (t >= 0 && t < text.tokens.length) { state.token = t; draw(); } };
  const small = (k, head, caption, chosen, choose) => {
    const map = make('canvas'), columns = streamOf(k).tokens.length;
    drawMap(map, k, head, Math.max(1, Math.min(7, 150 / Math.max(columns, text.tokens.length))), false);
    const figure = make('figure', { className: chosen ? 'chosen' : '' }, map, make('figcaption', { textContent: caption }));
    figure.onclick = choose;
    return figure;
  };
  el('heads').replaceChildren(...[-1, ...text.connections[k].weights.keys()].map(h => small(k, h, h < 0 ? 'mean' : 'head ' + h, h === state.head, () => { state.head = h; draw(); })));
  el('others').replaceChildren(...joins.map((_, i) => small(i, -1, label(i), i === k, () => { state.connection = i; draw(); })));
}

function draw() {
  el('connection').value = state.connection; el('head').value = state.head;
  drawBlocks();
  if (names.length) drawTasks();
  if (text) { drawAdded(); drawText(); drawMatrix(); }
}

const tokens = names.reduce((n, t) => n + data.tasks[t].tokens, 0);
el('facts').append('Composition ', make('b', { textContent: data.model }), ': ', make('b', { textContent: base(data.anchor.model) }), ' reads ',
  ...data.augmenting.flatMap((a, m) => [m ? ' and ' : '', make('b', { textContent: base(a.model) }), ` (mask ${a.mask}, aligned by ${a.align})`]),
  `; ${joins.length} connection${joins.length === 1 ? '' : 's'} of ${data.num_heads} head${data.num_heads === 1 ? '' : 's'}` + (data.adapters.length ? `; adapter ${data.adapters.join(', ')}` : '') + (names.length ? `; ${names.length} task${names.length === 1 ? '' : 's'}, ${tokens.toLocaleString('en')} tokens` : ''));
el('of').textContent = text ? ', here the mean over the text' : ', here the mean over the tasks';
el('connection').append(...joins.map((_, k) => make('option', { value: k, textContent: label(k) })));
el('head').append(make('option', { value: -1, textContent: 'mean of all' }), ...Array.from({ length: data.num_heads }, (_, h) => make('option', { value: h, textContent: h })));
if (!names.length) el('tasks_section').remove();
if (!text) { el('text_sections').remove(); el('head').parentElement.remove(); }
if (text && joins.length < 2) el('others_part').style.display = 'none';
el('connection').onchange = event => { state.connection = Number(event.target.value); draw(); };
el('head').onchange = event => { state.head = Number(event.target.value); draw(); };
if (names.length) el('metric').onchange = drawTasks;
dark.onchange = draw;
draw();
</script>
</body>
</html>
)html";

}  // namespace

std::string composition_routes_html(const OrderedJson& routes) { return page_with(kHead, routes, kTail); }

}  // namespace moesaic::eval
