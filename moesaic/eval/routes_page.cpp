// The page of routes_html(): a fixed document that draws the JSON put into it.
#include "moesaic/eval/page.h"
#include "moesaic/eval/routes.h"

namespace moesaic::eval {
namespace {

constexpr const char* kHead = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Moesaic: expert use</title>
<style>
  :root { --ink: #1d2433; --soft: #5d6779; --line: #dfe3ea; --page: #f5f6f9; --card: #ffffff; --accent: #2457c5; }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
  h1 { font-size: 26px; margin: 0 0 2px; }
  h2 { font-size: 18px; margin: 0 0 2px; }
  p.note { margin: 0 0 14px; color: var(--soft); max-width: 90ch; }
  .facts { color: var(--soft); margin-bottom: 18px; }
  .facts b { color: var(--ink); font-weight: 600; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
  .controls { position: sticky; top: 0; z-index: 5; background: var(--page); padding: 10px 0; display: flex; gap: 18px; flex-wrap: wrap; }
  label { color: var(--soft); }
  select { font: inherit; padding: 4px 8px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); color: var(--ink); }
  table.heat { border-collapse: separate; border-spacing: 2px; }
  table.heat th { font-weight: 500; font-size: 13px; color: var(--soft); padding: 0 6px; text-align: center; white-space: nowrap; }
  table.heat th.row { text-align: right; color: var(--ink); max-width: 300px; overflow: hidden; text-overflow: ellipsis; }
  table.heat th.up { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 6px 0; max-height: 190px; overflow: hidden; }
  table.heat td { width: 54px; height: 30px; text-align: center; font-size: 12px; border-radius: 4px; font-variant-numeric: tabular-nums; }
  .layers { display: flex; flex-wrap: wrap; gap: 12px 16px; margin-top: 18px; }
  .layers figure { margin: 0; }
  .layers figcaption { font-size: 12px; color: var(--soft); text-align: center; }
  .layers canvas { display: block; border-radius: 4px; }
  .scale { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--soft); margin-top: 10px; }
  .scale i { width: 180px; height: 12px; border-radius: 6px; display: inline-block; }
  .legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin-top: 8px; }
  .legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
  .text { line-height: 2.1; font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 14px; margin-top: 12px; white-space: pre-wrap; word-break: break-word; }
  .text span { padding: 3px 1px; border-radius: 3px; cursor: default; }
  #tip { position: fixed; display: none; background: var(--ink); color: #fff; font-size: 12px; padding: 8px 10px; border-radius: 6px; pointer-events: none; z-index: 9; }
  #tip div { display: flex; gap: 6px; align-items: center; }
  #tip b { display: inline-block; height: 8px; border-radius: 2px; }
  .scroll { overflow-x: auto; }
</style>
</head>
<body>
<main>
<h1>What the routers do</h1>
<div class="facts" id="facts"></div>
<div class="controls">
  <label>Site <select id="kind"></select></label>
  <label>Show <select id="metric"><option value="mean_prob">mean probability</option><option value="top1_share">share of tokens with this expert first</option></select></label>
</div>
<section><h2>Experts of each task</h2>
  <p class="note">Mean over all layers, then layer by layer (a row is a task, a column an expert; point at a cell for its value). Equal use would be <span id="uniform"></span> everywhere. Colours run from the lowest to the highest value shown: of the table, and of all layers together.</p>
  <div class="scroll" id="overall"></div><div class="layers" id="layers"></div><div class="scale" id="scale"></div></section>
<section><h2>How decided the routers are</h2>
  <p class="note">Entropy of the routing by layer, as a share of its largest value: 1 mixes all experts equally, 0 always takes one.</p>
  <div class="scroll" id="entropy"></div><div class="legend" id="tasks"></div></section>
<section id="similarity_section"><h2>Tasks that share experts</h2>
  <p class="note">Cosine of the tasks' mean probabilities over all sites. Colours span the values found between different tasks.</p>
  <div class="scroll" id="similarity"></div></section>
<section id="text_section"><h2>Token by token</h2>
  <p class="note">Each token in the colour of its most probable expert, stronger where the router is surer. Point at a token for all experts.</p>
  <label>Layer <select id="layer"></select></label>
  <div class="legend" id="experts"></div><div class="text" id="text"></div></section>
</main>
<div id="tip"></div>
<script id="data" type="application/json">)html";

constexpr const char* kTail = R"html(const tasks = Object.keys(data.tasks);
const siteKind = name => name.replace(/^.*\.layers\.\d+\./, '');
const kinds = [...new Set(Object.keys(data.sites).map(siteKind))];
const sitesOf = kind => Object.keys(data.sites).filter(n => siteKind(n) === kind).sort((a, b) => data.sites[a].layer - data.sites[b].layer);

const shade = x => between(blues, x);
const hue = (i, n) => (i * 360 / n + 210 + (i % 2) * 8) % 360;
const lineColour = (i, n) => `hsl(${hue(i, n)} 62% 44%)`;
const expertColour = (i, n, p) => `hsl(${hue(i, n)} 70% ${92 - 34 * p}%)`;

function showTip(event, nodes) { const t = el('tip'); t.replaceChildren(...nodes); t.style.display = 'block'; moveTip(event); }
function moveTip(event) { const t = el('tip'); t.style.left = Math.min(event.clientX + 14, innerWidth - t.offsetWidth - 8) + 'px'; t.style.top = Math.min(event.clientY + 14, innerHeight - t.offsetHeight - 8) + 'px'; }
const hideTip = () => { el('tip').style.display = 'none'; };

function heatTable(rows, columns, value, low, high, upright) {
  const table = make('table', { className: 'heat' });
  table.append(make('tr', {}, make('th'), ...columns.map(c => make('th', { className: upright ? 'up' : '', textContent: c, title: c }))));
  rows.forEach((name, r) => {
    const tr = make('tr', {}, make('th', { className: 'row', textContent: name, title: name }));
    columns.forEach((_, c) => {
      const v = value(r, c), colour = shade((v - low) / ((high - low) || 1)), td = make('td', { textContent: v.toFixed(2) });
      td.style.background = css(colour); td.style.color = inkOn(colour); tr.append(td);
    });
    table.append(tr);
  });
  return table;
}

function drawHeat() {
  const kind = el('kind').value, metric = el('metric').value, sites = sitesOf(kind), experts = data.sites[sites[0]].experts;
  const at = (t, s, e) => data.tasks[tasks[t]].sites[s][metric][e];
  const mean = (t, e) => sites.reduce((sum, s) => sum + at(t, s, e), 0) / sites.length;
  let low = 1, high = 0, meanLow = 1, meanHigh = 0;
  for (let t = 0; t < tasks.length; t++) for (let e = 0; e < experts; e++) {
    for (const s of sites) { low = Math.min(low, at(t, s, e)); high = Math.max(high, at(t, s, e)); }
    meanLow = Math.min(meanLow, mean(t, e)); meanHigh = Math.max(meanHigh, mean(t, e));
  }
  el('uniform').textContent = (1 / experts).toFixed(3);
  el('overall').replaceChildren(heatTable(tasks, Array.from({ length: experts }, (_, e) => 'expert ' + e), mean, meanLow, meanHigh));
  const bar = make('i'); bar.style.background = `linear-gradient(90deg, ${blues.map(css).join(',')})`;
  el('scale').replaceChildren('layers: ' + low.toFixed(3), bar, high.toFixed(3));
  const cell = Math.max(7, Math.min(16, Math.floor(150 / experts)));
  el('layers').replaceChildren(...sites.map(site => {
    const canvas = make('canvas', { width: experts * cell, height: tasks.length * cell }), g = canvas.getContext('2d');
    tasks.forEach((_, t) => { for (let e = 0; e < experts; e++) { g.fillStyle = css(shade((at(t, site, e) - low) / ((high - low) || 1))); g.fillRect(e * cell, t * cell, cell - 1, cell - 1); } });
    canvas.onmousemove = event => {
      const box = canvas.getBoundingClientRect(), e = Math.min(experts - 1, Math.max(0, Math.floor((event.clientX - box.left) / cell))), t = Math.min(tasks.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / cell)));
      showTip(event, [`${tasks[t]}, expert ${e}: ${at(t, site, e).toFixed(3)}`]);
    };
    canvas.onmouseleave = hideTip;
    return make('figure', {}, canvas, make('figcaption', { textContent: 'layer ' + data.sites[site].layer }));
  }));
}

function drawEntropy() {
  const sites = sitesOf(el('kind').value), most = Math.log(data.sites[sites[0]].experts), w = 1080, h = 260, left = 44, bottom = 30;
  const x = i => left + (sites.length > 1 ? i / (sites.length - 1) : 0.5) * (w - left - 14), y = v => 10 + (1 - v) * (h - bottom - 10);
  const chart = svg('svg', { viewBox: `0 0 ${w} ${h}`, width: '100%', style: 'min-width:640px' });
  for (const v of [0, 0.25, 0.5, 0.75, 1]) chart.append(svg('line', { x1: left, x2: w - 14, y1: y(v), y2: y(v), stroke: '#dfe3ea' }), svg('text', { x: left - 8, y: y(v) + 4, 'text-anchor': 'end', 'font-size': 12, fill: '#5d6779' }, v));
  const step = Math.ceil(sites.length / 16);
  sites.forEach((s, i) => { if (i % step === 0 && sites.length - i > step) chart.append(svg('text', { x: x(i), y: h - 10, 'text-anchor': 'middle', 'font-size': 12, fill: '#5d6779' }, data.sites[s].layer)); });
  chart.append(svg('text', { x: w - 14, y: h - 10, 'text-anchor': 'end', 'font-size': 12, fill: '#5d6779' }, 'layer'));
  tasks.forEach((task, t) => {
    const values = sites.map(s => data.tasks[task].sites[s].entropy / most), colour = lineColour(t, tasks.length);
    chart.append(svg('polyline', { points: values.map((v, i) => `${x(i)},${y(v)}`).join(' '), fill: 'none', stroke: colour, 'stroke-width': 2, 'stroke-linejoin': 'round' }));
    values.forEach((v, i) => {
      const dot = svg('circle', { cx: x(i), cy: y(v), r: 3.5, fill: colour });
      dot.onmousemove = event => showTip(event, [`${task}, layer ${data.sites[sites[i]].layer}: ${v.toFixed(3)}`]);
      dot.onmouseleave = hideTip;
      chart.append(dot);
    });
  });
  el('entropy').replaceChildren(chart);
}

function drawSimilarity() {
  if (tasks.length < 2) { el('similarity_section').remove(); return; }
  const cosine = data.similarity.cosine, apart = cosine.flatMap((row, i) => row.filter((_, j) => j !== i));
  el('similarity').replaceChildren(heatTable(tasks, tasks, (r, c) => cosine[r][c], Math.min(...apart) - 0.02, Math.max(...apart), true));
}

function drawText() {
  const site = el('layer').value, rows = data.text.sites[site], experts = rows[0].length;
  el('experts').replaceChildren(...Array.from({ length: experts }, (_, e) => { const dot = make('i'); dot.style.background = expertColour(e, experts, 1); return make('span', {}, dot, 'expert ' + e); }));
  el('text').replaceChildren(...data.text.tokens.flatMap((token, t) => {
    const p = rows[t], best = p.indexOf(Math.max(...p)), sure = (p[best] - 1 / experts) / (1 - 1 / experts), span = make('span', { textContent: token.replace(/\n/g, '\u21b5') });
    span.style.background = expertColour(best, experts, 0.25 + 0.75 * Math.sqrt(Math.max(0, sure)));
    span.onmousemove = event => showTip(event, p.map((v, e) => { const bar = make('b'); bar.style.width = Math.max(1, 120 * v) + 'px'; bar.style.background = expertColour(e, experts, 0.8); return make('div', {}, `expert ${e}`, bar, v.toFixed(3)); }));
    span.onmouseleave = hideTip;
    return token.includes('\n') ? [span, '\n'] : [span];
  }));
}

function fillLayers() {
  if (!data.text) { el('text_section').remove(); return; }
  const sites = sitesOf(el('kind').value), previous = el('layer').selectedIndex;
  el('layer').replaceChildren(...sites.map(s => make('option', { value: s, textContent: data.sites[s].layer })));
  el('layer').selectedIndex = previous >= 0 ? previous : Math.floor(sites.length / 2);
  drawText();
}

function draw() { drawHeat(); drawEntropy(); if (document.getElementById('text_section')) fillLayers(); }

el('facts').append('Model ', make('b', { textContent: data.model }), ', adapter ', make('b', { textContent: data.adapters.join(', ') || 'none' }), `, ${tasks.length} tasks, ${tasks.reduce((n, t) => n + data.tasks[t].tokens, 0).toLocaleString('en')} tokens, ${Object.keys(data.sites).length} routers`);
el('kind').replaceChildren(...kinds.map(k => make('option', { value: k, textContent: k })));
el('tasks').replaceChildren(...tasks.map((t, i) => { const dot = make('i'); dot.style.background = lineColour(i, tasks.length); return make('span', {}, dot, t); }));
el('kind').onchange = draw; el('metric').onchange = drawHeat; el('layer').onchange = drawText;
draw(); drawSimilarity();
</script>
</body>
</html>
)html";

}  // namespace

std::string routes_html(const OrderedJson& routes) { return page_with(kHead, routes, kTail); }

}  // namespace moesaic::eval
