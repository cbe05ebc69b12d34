// Draws routes_json(): what routers decide and what connections read.
const tasks = Object.keys(data.tasks);
const text = data.text;

const svg = (tag, attributes, ...kids) => {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const key in attributes) e.setAttribute(key, attributes[key]);
  e.append(...kids);
  return e;
};
const range = n => Array.from({ length: n }, (_, i) => i);
const meanOf = values => values.reduce((a, b) => a + b, 0) / values.length;

// Colours: from the card's to a strong blue, through points chosen to differ evenly in lightness.
const light = [[247, 249, 253], [205, 221, 245], [143, 180, 232], [79, 131, 208], [36, 87, 173], [14, 45, 106]];
const night = [[30, 37, 49], [29, 58, 102], [36, 87, 160], [66, 128, 210], [128, 178, 240], [214, 231, 255]];
const ramp = () => (dark.matches ? night : light);
function shade(x) {
  const colours = ramp();
  const p = Math.max(0, Math.min(1, x)) * (colours.length - 1);
  const i = Math.min(colours.length - 2, Math.floor(p));
  return colours[i].map((a, c) => Math.round(a + (colours[i + 1][c] - a) * (p - i)));
}
const css = c => `rgb(${c[0]},${c[1]},${c[2]})`;
const inkOn = c => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 140 ? '#fff' : '#1d2433');
const paint = (e, x) => {
  const colour = shade(x);
  e.style.background = css(colour);
  e.style.color = inkOn(colour);
};
const rampBar = () => {
  const bar = make('i', { className: 'ramp' });
  bar.style.background = `linear-gradient(90deg, ${ramp().map(css).join(',')})`;
  return bar;
};
const hue = (i, n) => ((i * 360) / n + 210 + (i % 2) * 8) % 360;
const lineColour = (i, n) => `hsl(${hue(i, n)} 62% ${dark.matches ? 62 : 44}%)`;
const expertColour = (i, n, p) =>
  dark.matches ? `hsl(${hue(i, n)} 55% ${20 + 26 * p}%)` : `hsl(${hue(i, n)} 70% ${92 - 34 * p}%)`;
const dot = colour => {
  const e = make('i');
  e.style.background = colour;
  return e;
};

function showTip(event, ...nodes) {
  const t = el('tip');
  t.replaceChildren(...nodes);
  t.style.display = 'block';
  t.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - t.offsetWidth - 8)) + 'px';
  t.style.top = Math.min(event.clientY + 14, innerHeight - t.offsetHeight - 8) + 'px';
}
const hideTip = () => {
  el('tip').style.display = 'none';
};
const tip = (e, ...nodes) => {
  e.onmousemove = event => showTip(event, ...nodes);
  e.onmouseleave = hideTip;
};

const word = token => (token === '' ? '\u2026' : token.replace(/\n/g, '\u21b5'));
/// At most n characters, the end kept: names of models and tasks differ there.
const short = (name, n) => (name.length > n ? '\u2026' + name.slice(1 - n) : name);
const named = token => word(token).trim() || '\u2423';
const quoted = token => (token === '' ? 'part of a character' : `\u201c${named(token)}\u201d`);
const count = (n, what) => `${n.toLocaleString('en')} ${what}${n === 1 ? '' : 's'}`;
const options = (id, values, label) =>
  el(id).replaceChildren(...values.map(v => make('option', { value: v, textContent: label(v) })));

// ---- Routers

const owners = Object.keys(data.routers);
const kindOf = site => site.replace(/^.*\.layers\.\d+\./, '');
const chosen = () => data.routers[el('owner').value];
const layerOf = site => chosen()[site].layer;
const sites = () =>
  Object.keys(chosen())
    .filter(site => kindOf(site) === el('kind').value)
    .sort((a, b) => layerOf(a) - layerOf(b));
const figures = (task, site) => data.tasks[task].routers[el('owner').value][site];

function heatTable(rows, columns, value, low, high, upright) {
  const heads = columns.map(c => make('th', { className: upright ? 'up' : '', textContent: c, title: c }));
  const table = make('table', {}, make('tr', {}, make('th'), ...heads));
  rows.forEach((name, r) => {
    const cells = columns.map((_, c) => {
      const v = value(r, c);
      const td = make('td', { className: 'value', textContent: v.toFixed(2) });
      paint(td, (v - low) / (high - low || 1));
      return td;
    });
    table.append(make('tr', {}, make('th', { className: 'row', textContent: name, title: name }), ...cells));
  });
  return table;
}

function drawHeat() {
  const shown = sites();
  const keeps = tasks.every(task => shown.every(site => figures(task, site).kept_share));
  const places = el('metric').querySelector('[value=kept_share]');
  places.hidden = places.disabled = !keeps;
  if (!keeps && el('metric').value === places.value) el('metric').value = 'mean_prob';
  const metric = el('metric').value;
  const experts = Math.max(...shown.map(site => chosen()[site].experts));
  const at = (t, site, e) => figures(tasks[t], site)[metric][e];
  const having = e => shown.filter(site => chosen()[site].experts > e);
  const mean = (t, e) => meanOf(having(e).map(site => at(t, site, e)));
  const means = tasks.flatMap((_, t) => range(experts).map(e => mean(t, e)));
  const all = tasks.flatMap((_, t) => shown.flatMap(site => figures(tasks[t], site)[metric]));
  const low = Math.min(...all);
  const high = Math.max(...all);
  const equal = new Set(shown.map(site => (1 / chosen()[site].experts).toFixed(3)));
  el('uniform').textContent = [...equal].join(' or ');
  const names = range(experts).map(e => 'expert ' + e);
  el('overall').replaceChildren(heatTable(tasks, names, mean, Math.min(...means), Math.max(...means)));
  el('scale').replaceChildren(make('span', {}, 'layers: ' + low.toFixed(3), rampBar(), high.toFixed(3)));
  const cell = Math.max(7, Math.min(16, Math.floor(150 / experts)));
  el('layers').replaceChildren(
    ...shown.map(site => {
      const own = chosen()[site].experts;
      const canvas = make('canvas', { width: own * cell, height: tasks.length * cell });
      const g = canvas.getContext('2d');
      tasks.forEach((_, t) => {
        for (const e of range(own)) {
          g.fillStyle = css(shade((at(t, site, e) - low) / (high - low || 1)));
          g.fillRect(e * cell, t * cell, cell - 1, cell - 1);
        }
      });
      canvas.onmousemove = event => {
        const box = canvas.getBoundingClientRect();
        const e = Math.min(own - 1, Math.max(0, Math.floor((event.clientX - box.left) / cell)));
        const t = Math.min(tasks.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / cell)));
        showTip(event, `${tasks[t]}, expert ${e}: ${at(t, site, e).toFixed(3)}`);
      };
      canvas.onmouseleave = hideTip;
      return make('figure', {}, canvas, make('figcaption', { textContent: 'layer ' + layerOf(site) }));
    })
  );
}

function drawEntropy() {
  const shown = sites();
  const wide = Math.max(300, el('entropy').clientWidth), tall = 260, left = 44, bottom = 30;
  const x = i => left + (shown.length > 1 ? i / (shown.length - 1) : 0.5) * (wide - left - 14);
  const y = v => 10 + (1 - v) * (tall - bottom - 10);
  const chart = svg('svg', { width: wide, height: tall, style: 'display:block' });
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(
      svg('line', { x1: left, x2: wide - 14, y1: y(v), y2: y(v), class: 'grid' }),
      svg('text', { x: left - 8, y: y(v) + 4, 'text-anchor': 'end' }, v)
    );
  }
  const step = Math.ceil((shown.length * 60) / wide);
  shown.forEach((site, i) => {
    if (i % step !== 0 || shown.length - i <= step) return;
    chart.append(svg('text', { x: x(i), y: tall - 10, 'text-anchor': 'middle' }, layerOf(site)));
  });
  chart.append(svg('text', { x: wide - 14, y: tall - 10, 'text-anchor': 'end' }, 'layer'));
  tasks.forEach((task, t) => {
    const values = shown.map(site => figures(task, site).entropy_share);
    const colour = lineColour(t, tasks.length);
    const points = values.map((v, i) => `${x(i)},${y(v)}`).join(' ');
    chart.append(svg('polyline', { points, fill: 'none', stroke: colour, 'stroke-width': 2 }));
    values.forEach((v, i) => {
      const mark = svg('circle', { cx: x(i), cy: y(v), r: 3.5, fill: colour });
      tip(mark, `${task}, layer ${layerOf(shown[i])}: ${v.toFixed(3)}`);
      chart.append(mark);
    });
  });
  el('entropy').replaceChildren(chart);
  el('task_names').replaceChildren(
    ...tasks.map((task, t) => make('span', {}, dot(lineColour(t, tasks.length)), task))
  );
}

function drawSimilarity() {
  const cosine = data.similarity.cosine;
  const apart = cosine.flatMap((row, i) => row.filter((_, j) => j !== i));
  const low = Math.min(...apart) - 0.02;
  el('similarity').replaceChildren(
    heatTable(tasks, tasks, (r, c) => cosine[r][c], low, Math.max(...apart), true)
  );
}

/// The tokens that an owner's routers read: those of its augmenting model, else the text's.
function tokensOf(owner) {
  const [, source] = /^augmenting\.(\d+)$/.exec(owner) || [];
  return source !== undefined && text.streams[source] ? text.streams[source].tokens : text.tokens;
}

function drawExperts() {
  const rows = text.routers[el('owner').value][el('layer').value];
  const experts = rows[rows.length - 1].length;
  el('experts').replaceChildren(
    ...range(experts).map(e => make('span', {}, dot(expertColour(e, experts, 1)), 'expert ' + e))
  );
  el('expert_text').replaceChildren(
    ...tokensOf(el('owner').value).flatMap((token, t) => {
      const p = rows[t];
      if (!p.length) return [make('span', { textContent: word(token) })];
      const best = p.indexOf(Math.max(...p));
      const sure = Math.max(0, (p[best] - 1 / experts) / (1 - 1 / experts));
      const span = make('span', { textContent: word(token) });
      span.style.background = expertColour(best, experts, 0.25 + 0.75 * Math.sqrt(sure));
      span.onmousemove = event =>
        showTip(
          event,
          ...p.map((v, e) => {
            const bar = make('b');
            bar.style.width = Math.max(1, 120 * v) + 'px';
            bar.style.background = expertColour(e, experts, 0.8);
            return make('div', {}, `expert ${e}`, bar, v.toFixed(3));
          })
        );
      span.onmouseleave = hideTip;
      return token.includes('\n') ? [span, '\n'] : [span];
    })
  );
}

function drawRouters() {
  if (tasks.length) {
    drawHeat();
    drawEntropy();
    if (tasks.length > 1) drawSimilarity();
  }
  if (!text) return;
  const previous = el('layer').selectedIndex;
  const shown = sites();
  options('layer', shown, layerOf);
  el('layer').selectedIndex = previous >= 0 && previous < shown.length ? previous : Math.floor(shown.length / 2);
  drawExperts();
}

function chooseOwner() {
  options('kind', [...new Set(Object.keys(chosen()).map(kindOf))], k => k);
  drawRouters();
}

function startRouters() {
  options('owner', owners, owner => owner || 'the model');
  if (!tasks.length) for (const id of ['router_tasks', 'metric_label']) el(id).remove();
  if (tasks.length === 1) el('similarity_section').remove();
  if (!text) el('router_text').remove();
  el('owner').onchange = chooseOwner;
  el('kind').onchange = drawRouters;
  if (tasks.length) el('metric').onchange = drawHeat;
  if (text) el('layer').onchange = drawExperts;
  chooseOwner();
}

// ---- Connections

const structure = data.structure;
const joins = structure ? structure.connections : [];
const state = { connection: 0, head: -1, token: text ? text.tokens.length - 1 : 0 };
const block = i => (i < 0 ? 'emb' : String(i)); // or 'final'
const base = path => path.split('/').filter(part => part).pop() || 'model';
const sourceOf = k => structure.augmenting[joins[k].augmenting];
const streamOf = k => text.streams[joins[k].augmenting];
const label = k => {
  const name = structure.augmenting.length > 1 ? ', ' + short(base(sourceOf(k).model), 18) : '';
  return `${joins[k].aug === 'final' ? '' : 'block '}${block(joins[k].aug)} \u2192 ${block(joins[k].anchor)}${name}`;
};
const shortly = v => (v >= 0.995 || v < 0.0005 ? v.toFixed(2) : v.toFixed(3));
const choose = change => {
  Object.assign(state, change);
  drawConnections();
};

const means = new Map();
/// Weights [T][visible] of a head, or their mean over heads (head -1).
function weights(k, head) {
  const all = text.connections[k].weights;
  if (head >= 0) return all[head];
  if (!means.has(k)) means.set(k, all[0].map((row, t) => row.map((_, s) => meanOf(all.map(h => h[t][s])))));
  return means.get(k);
}
/// Weights are shown by their square root: most are small.
const strength = w => Math.sqrt(w);

/// Mean of what a connection adds, over the text or else over all tasks' tokens.
function usual(k) {
  if (text) return meanOf(text.connections[k].added);
  const tokens = tasks.reduce((n, t) => n + data.tasks[t].tokens, 0);
  return tasks.reduce((n, t) => n + data.tasks[t].tokens * data.tasks[t].connections[k].added, 0) / tokens;
}

function drawBlocks() {
  const most = Math.max(...joins.map((_, k) => usual(k)), 1e-9);
  const wide = 500;
  const tallest = Math.max(structure.anchor.blocks, ...structure.augmenting.map(a => a.blocks));
  const step = Math.max(13, Math.min(26, Math.floor(480 / tallest)));
  el('blocks').replaceChildren(
    ...structure.augmenting.map((model, m) => {
      const mine = joins.map((j, k) => [j, k]).filter(([j]) => j.augmenting === m);
      const row = (i, model) => (i === 'final' ? model.blocks : i);
      const ends = mine.flatMap(([j]) => [row(j.aug, model), row(j.anchor, structure.anchor)]);
      const low = Math.min(0, ...ends);
      const rows = Math.max(model.blocks, structure.anchor.blocks, ...ends.map(i => i + 1)) - low;
      const y = i => 34 + (rows - 1 - (i - low)) * step + step / 2;
      const size = { viewBox: `0 0 ${wide} ${44 + rows * step}`, width: wide, style: 'max-width:100%;height:auto' };
      const chart = svg('svg', size);
      const column = (x, title, { blocks }, used) => {
        chart.append(svg('text', { x: x + 35, y: 18, 'text-anchor': 'middle' }, short(title, 24)));
        for (let i = low; i <= blocks; i++) {
          const place = i < blocks ? i : 'final';
          if ((i < 0 || i === blocks) && !used.has(place)) continue;
          const box = { x, y: y(i) - (step - 4) / 2, width: 70, height: step - 4, rx: 4 };
          chart.append(
            svg('rect', { ...box, class: used.has(place) ? 'joined' : 'block' }),
            svg('text', { x: x + 35, y: y(i) + 4, 'text-anchor': 'middle' }, block(place))
          );
        }
      };
      column(70, base(model.model), model, new Set(mine.map(([j]) => j.aug)));
      column(345, base(structure.anchor.model), structure.anchor, new Set(mine.map(([j]) => j.anchor)));
      for (const [j, k] of mine) {
        const from = y(row(j.aug, model));
        const to = y(row(j.anchor, structure.anchor));
        const line = svg('path', {
          d: `M140 ${from} C 220 ${from} 260 ${to} 340 ${to}`,
          fill: 'none',
          stroke: k === state.connection ? variable('--accent') : css(shade(0.62)),
          'stroke-width': 1.5 + (8 * usual(k)) / most,
          'stroke-linecap': 'round',
          class: 'join',
        });
        line.onclick = () => choose({ connection: k });
        tip(line, `${label(k)}: adds ${usual(k).toFixed(3)} of |H|`);
        chart.append(line);
      }
      return chart;
    })
  );
}

function drawUses() {
  const use = el('use').value;
  const value = (t, k) => data.tasks[tasks[t]].connections[k][use];
  const all = tasks.flatMap((_, t) => joins.map((_, k) => value(t, k)));
  const high = use === 'added' ? Math.max(...all, 1e-9) : 1;
  el('uses').replaceChildren(heatTable(tasks, joins.map((_, k) => label(k)), value, 0, high));
}

const addedMost = () => Math.max(...text.connections.flatMap(c => c.added), 1e-9);
function drawAdded() {
  const most = addedMost();
  const table = make('table');
  joins.forEach((_, k) => {
    const head = 'row' + (k === state.connection ? ' chosen' : '');
    const cells = text.tokens.map((token, t) => {
      const v = text.connections[k].added[t];
      const here = k === state.connection && t === state.token;
      const cell = make('td', { className: 'cell' + (here ? ' chosen' : '') });
      paint(cell, v / most);
      tip(cell, `${quoted(token)}, ${label(k)}: ${shortly(v)}`);
      cell.onclick = () => choose({ connection: k, token: t });
      return cell;
    });
    table.append(make('tr', {}, make('th', { className: head, textContent: label(k) }), ...cells));
  });
  const names = text.tokens.map((token, t) => {
    const className = 'up token' + (t === state.token ? ' chosen' : '');
    const th = make('th', { className, textContent: named(token) });
    th.onclick = () => choose({ token: t });
    return th;
  });
  table.append(make('tr', {}, make('th'), ...names));
  el('added').replaceChildren(table);
  el('added_scale').replaceChildren(make('span', {}, '0', rampBar(), most.toFixed(3)));
}

function drawReading(token) {
  const k = state.connection;
  const stream = streamOf(k);
  const row = weights(k, state.head)[token];
  const seen = stream.visible[token];
  [...el('anchor_text').children].forEach((span, t) => span.classList.toggle('chosen', t === token));
  [...el('source_text').children].forEach((span, s) => {
    const visible = s < seen;
    span.className = visible ? '' : 'unseen';
    span.style.background = span.style.color = '';
    if (visible) paint(span, strength(row[s]));
    const said = visible ? shortly(row[s]) : 'not seen from ' + quoted(text.tokens[token]);
    tip(span, `${quoted(stream.tokens[s])}: ${said}`);
  });
  const best = row
    .map((w, s) => [w, s])
    .sort((a, b) => b[0] - a[0])
    .slice(0, 3)
    .filter(([w]) => w >= 0.05);
  const reads = best.flatMap(([w, s], i) => [
    i ? ', ' : '',
    make('b', { textContent: quoted(stream.tokens[s]) }),
    ` ${w.toFixed(2)}`,
  ]);
  el('status').replaceChildren(
    make('b', { textContent: quoted(text.tokens[token]) }),
    ` (token ${token}) sees ${seen} of ${stream.tokens.length}`,
    ...(seen ? [', reads ', ...reads] : []),
    `; the connection adds ${shortly(text.connections[k].added[token])} of |H|.`
  );
}

function drawTexts() {
  const k = state.connection;
  const anchor = `The anchor, ${base(structure.anchor.model)}: ${count(text.tokens.length, 'token')}`;
  const source = `The augmenting model, ${base(sourceOf(k).model)}: ${count(streamOf(k).tokens.length, 'token')}`;
  el('anchor_name').textContent = anchor + ', coloured by what the connection adds';
  el('source_name').textContent = source + ', coloured by the weights';
  const most = addedMost();
  el('anchor_text').replaceChildren(
    ...text.tokens.map((token, t) => {
      const span = make('span', { textContent: word(token) });
      paint(span, text.connections[k].added[t] / most);
      span.onmouseenter = () => drawReading(t);
      span.onclick = () => choose({ token: t });
      return span;
    })
  );
  el('anchor_text').onmouseleave = () => drawReading(state.token);
  el('source_text').replaceChildren(...streamOf(k).tokens.map(token => make('span', { textContent: word(token) })));
  drawReading(state.token);
  el('weight_scale').replaceChildren(
    make('span', {}, 'weight 0', rampBar(), '1 (by its square root)'),
    make('span', {}, make('i', { className: 'unseen' }), 'not seen')
  );
}

/// Draws a map of weights with square cells; labels where there is room. Returns where its cells begin.
function drawMap(canvas, k, head, cell, labels) {
  const rows = weights(k, head);
  const stream = streamOf(k);
  const columns = stream.tokens.length;
  const ratio = devicePixelRatio || 1;
  const roomy = labels && cell >= 11;
  const left = roomy ? 96 : 0;
  const top = roomy ? 84 : 0;
  const across = Math.max(1, columns) * cell;
  const down = rows.length * cell;
  canvas.width = (left + across) * ratio;
  canvas.height = (top + down) * ratio;
  canvas.style.width = left + across + 'px';
  canvas.style.height = top + down + 'px';
  const g = canvas.getContext('2d');
  g.scale(ratio, ratio);
  const gap = cell >= 6 ? 1 : 0;
  g.fillStyle = variable('--unseen');
  g.fillRect(left, top, columns * cell, down);
  g.strokeStyle = variable('--hatch');
  g.lineWidth = 1;
  g.save();
  g.beginPath();
  g.rect(left, top, columns * cell, down);
  g.clip();
  for (let x = -down; x < columns * cell; x += 7) {
    g.beginPath();
    g.moveTo(left + x, top + down);
    g.lineTo(left + x + down, top);
    g.stroke();
  }
  g.restore();
  rows.forEach((row, t) => {
    g.fillStyle = variable('--card');
    g.fillRect(left, top + t * cell, row.length * cell, cell);
    row.forEach((w, s) => {
      g.fillStyle = css(shade(strength(w)));
      g.fillRect(left + s * cell, top + t * cell, cell - gap, cell - gap);
    });
  });
  if (!labels) return { left, top };
  g.font = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';
  g.textBaseline = 'middle';
  if (roomy) {
    g.textAlign = 'right';
    text.tokens.forEach((token, t) => {
      g.fillStyle = variable(t === state.token ? '--ink' : '--soft');
      g.fillText(short(named(token), 11), left - 6, top + (t + 0.5) * cell);
    });
    g.fillStyle = variable('--soft');
    g.textAlign = 'left';
    stream.tokens.forEach((token, s) => {
      g.save();
      g.translate(left + (s + 0.5) * cell, top - 6);
      g.rotate(-Math.PI / 2);
      g.fillText(short(named(token), 11), 0, 0);
      g.restore();
    });
  }
  g.strokeStyle = variable('--accent');
  g.lineWidth = 2;
  g.strokeRect(left + 1, top + state.token * cell, across - 2, cell);
  return { left, top };
}

function drawMatrix() {
  const k = state.connection;
  const stream = streamOf(k);
  const rows = weights(k, state.head);
  const canvas = el('matrix');
  const longest = Math.max(stream.tokens.length, text.tokens.length, 1);
  const cell = Math.max(3, Math.min(22, Math.floor(1000 / longest)));
  const { left, top } = drawMap(canvas, k, state.head, cell, true);
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [
      Math.floor((event.clientY - box.top - top) / cell),
      Math.floor((event.clientX - box.left - left) / cell),
    ];
  };
  canvas.onmousemove = event => {
    const [t, s] = place(event);
    if (t < 0 || t >= text.tokens.length || s < 0 || s >= stream.tokens.length) return hideTip();
    const said = s < rows[t].length ? shortly(rows[t][s]) : 'not seen';
    showTip(event, `${quoted(text.tokens[t])} reads ${quoted(stream.tokens[s])}: ${said}`);
  };
  canvas.onmouseleave = hideTip;
  canvas.onclick = event => {
    const [t] = place(event);
    if (t >= 0 && t < text.tokens.length) choose({ token: t });
  };
  const small = (of, head, caption, isChosen, change) => {
    const map = make('canvas');
    const most = Math.max(streamOf(of).tokens.length, text.tokens.length);
    drawMap(map, of, head, Math.max(1, Math.min(7, 150 / most)), false);
    const title = make('figcaption', { textContent: caption });
    const figure = make('figure', { className: isChosen ? 'chosen' : '' }, map, title);
    figure.onclick = () => choose(change);
    return figure;
  };
  el('heads').replaceChildren(
    ...[-1, ...text.connections[k].weights.keys()].map(h =>
      small(k, h, h < 0 ? 'mean' : 'head ' + h, h === state.head, { head: h })
    )
  );
  el('others').replaceChildren(...joins.map((_, i) => small(i, -1, label(i), i === k, { connection: i })));
}

function drawConnections() {
  el('connection').value = state.connection;
  drawBlocks();
  if (tasks.length) drawUses();
  if (!text) return;
  el('head').value = state.head;
  drawAdded();
  drawTexts();
  drawMatrix();
}

function startConnections() {
  el('of').textContent = text ? ', here the mean over the text' : ', here the mean over the tasks';
  options('connection', range(joins.length), label);
  options('head', [-1, ...range(structure.num_heads)], h => (h < 0 ? 'mean of all' : h));
  if (tasks.length) el('use').onchange = drawUses;
  else el('reading_tasks').remove();
  if (!text) for (const id of ['reading_text', 'head_label']) el(id).remove();
  if (text && joins.length < 2) el('others_part').style.display = 'none';
  el('connection').onchange = event => choose({ connection: Number(event.target.value) });
  if (text) el('head').onchange = event => choose({ head: Number(event.target.value) });
  drawConnections();
}

// ---- The page

const routers = owners.reduce((n, owner) => n + Object.keys(data.routers[owner]).length, 0);
const strong = name => make('b', { textContent: name });
el('title').textContent = routers
  ? structure
    ? 'What routers do and the anchor reads'
    : 'What the routers do'
  : 'What the anchor reads';
el('facts').append(structure ? 'Composition ' : 'Model ', strong(data.model));
if (structure) {
  el('facts').append(': ', strong(base(structure.anchor.model)), ' reads ');
  structure.augmenting.forEach((a, m) =>
    el('facts').append(m ? ' and ' : '', strong(base(a.model)), ` (mask ${a.mask}, aligned by ${a.align})`)
  );
  el('facts').append(`; ${count(joins.length, 'connection')} of ${count(structure.num_heads, 'head')}`);
}
if (data.adapters.length) el('facts').append(', adapter ', strong(data.adapters.join(', ')));
if (tasks.length) {
  const tokens = tasks.reduce((n, t) => n + data.tasks[t].tokens, 0);
  el('facts').append(`, ${count(tasks.length, 'task')}, ${count(tokens, 'token')}`);
}
if (routers) el('facts').append(`, ${count(routers, 'router')}`);

if (routers) startRouters();
else el('routers').remove();
if (structure) startConnections();
else el('connections').remove();
const drawAll = () => {
  if (routers) drawRouters();
  if (structure) drawConnections();
};
dark.onchange = drawAll;
let width = innerWidth;
addEventListener('resize', () => {
  if (width !== innerWidth) drawAll();
  width = innerWidth;
});
